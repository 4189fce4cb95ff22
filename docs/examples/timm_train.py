"""Run timm's own train.py on a converted model, under the name "ghostified".

    python timm_train.py converted/ pytorch-image-models/train.py --model ghostified --data-dir imagenet/ \
        --opt sgd --lr 0.01 --epochs 5 --amp

All arguments after the path of train.py are timm's, distillation too (--kd-model-name resnet18). To turn the checkpoint
that it writes into a folder of ghostify:

    from ghostify import load, load_weights, save
    save(load_weights(load("converted/"), "output/train/.../model_best.pth.tar"), "tuned/")
"""

import runpy
import sys

from timm.models import register_model

from ghostify import load

converted, train = sys.argv[1:3]


@register_model
def ghostified(pretrained=False, **kwargs):
    """The converted model; timm's other arguments do not apply to it."""
    del pretrained, kwargs
    return load(converted)


sys.argv = [train, *sys.argv[3:]]
runpy.run_path(train, run_name="__main__")
