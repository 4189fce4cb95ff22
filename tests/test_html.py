import json

from ghostify.reporting.html import script_json


def test_no_text_in_a_chart_ends_the_script_or_opens_another():
    data = {"layers": ["</script><script>alert(1)</script>", "<!-- <script>"]}
    text = script_json(data)
    assert "<" not in text
    assert json.loads(text) == data
