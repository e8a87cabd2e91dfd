"The attention explorer in a browser: pointer, keys, touch, all controls, the package's numbers."
import pytest
import torch

from vit_course.data import load_fashion_mini
from vit_course.interactive import attention_explorer, from_bytes, to_bytes
from vit_course.rollout import attention_rollout, capture_attention
from vit_course.training import load_model
from vit_course.vit import ViT

LAYERS, N = 6, 50


@pytest.fixture(scope="module")
def shipped():
    "The shipped model with two pictures."
    lit, mini = load_model("fashion"), load_fashion_mini()
    labels = [lit.hparams.classes[c] for c in mini.test_labels[:2].tolist()]
    return lit, mini.test_images[:2].float() / 255, labels


@pytest.fixture(scope="module")
def page(shipped, tmp_path_factory):
    lit, images, labels = shipped
    file = tmp_path_factory.mktemp("explorer") / "page.html"
    explorer = attention_explorer(lit, images, labels, names=["first", "second"])
    file.write_text(explorer.page(), encoding="utf-8")
    return file


@pytest.fixture
def tab(browser, page):
    faults, tab = [], browser.new_page(viewport={"width": 1100, "height": 900})
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: message.type == "error" and faults.append(message.text))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.querySelector('vit-explorer .vx-says')?.textContent")
    yield tab
    assert not faults
    tab.close()


def says(tab, number=0):
    return tab.locator(".vx-says").nth(number).inner_text()


SET = """([name, value]) => {
  const c = document.querySelector('vit-explorer').controls[name];
  c.value = value;
  c.dispatchEvent(new Event('input'));
}"""


def control(tab, name, value):
    "Set a control as a user's hand would, with its event."
    tab.evaluate(SET, [name, str(value)])


def matrix(tab, code):
    shown = tab.evaluate(f"(e => Array.from({code}))(document.querySelector('vit-explorer'))")
    return torch.tensor(shown, dtype=torch.float32).view(N, N)


def cell(tab, row, col):
    return tab.locator(f"[data-token='{1 + 7 * (row - 1) + col - 1}']")


def test_the_pointer_chooses_and_a_click_pins(tab):
    assert "Class token looks at" in says(tab)
    cell(tab, 4, 3).hover()
    assert "Row 4, column 3 looks at" in says(tab)
    cell(tab, 4, 3).click()
    cell(tab, 6, 6).hover()
    assert "Row 4, column 3 (pinned)" in says(tab)
    cell(tab, 4, 3).click()
    cell(tab, 6, 6).hover()
    assert "Row 6, column 6 looks at" in says(tab)


STEPS = {  # what is said after each key, in this order
    "ArrowDown": "Row 1, column 1", "ArrowRight": "Row 1, column 2",
    "End": "Row 1, column 7", "Home": "Row 1, column 1",
    "Control+End": "Row 7, column 7", "ArrowUp": "Row 6, column 7",
    "ArrowLeft": "Row 6, column 6", "Control+Home": "Class token",
    "ArrowUp ": "Class token",  # the space: a key for the second time
}


def test_the_keyboard_goes_everywhere(tab):
    assert tab.locator("[role=gridcell][tabindex='0']").count() == 1, "one tab stop"
    tab.locator("[role=gridcell][tabindex='0']").focus()
    for key, expected in STEPS.items():
        tab.keyboard.press(key.strip())
        assert says(tab).split(". ")[1].startswith(expected), key
        assert tab.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    assert says(tab) == tab.locator("[role=status]").text_content(), "said aloud"
    tab.keyboard.press("Enter")
    assert "(pinned)" in says(tab)
    tab.keyboard.press("Escape")
    assert "(pinned)" not in says(tab)
    assert tab.locator("[role=gridcell][tabindex='0']").count() == 1


def test_touch_chooses_and_pins(browser, page):
    context = browser.new_context(
        viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_function("document.querySelector('vit-explorer .vx-says')?.textContent")
    cell(tab, 2, 5).tap()
    assert "Row 2, column 5 (pinned)" in says(tab)
    cell(tab, 3, 5).tap()
    assert "Row 3, column 5 (pinned)" in says(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


CHANGES = [
    ("layer", 2), ("heads", "max"), ("heads", "2"), ("direction", "column"),
    ("scale", "shared"), ("strength", 20), ("mode", "rollout"), ("residual", 0.8),
    ("discard", 0.6), ("start", 4), ("heads", "min"),
]


def test_every_control_changes_what_is_said_or_seen(tab):
    cell(tab, 3, 3).click()

    def seen():
        colours = tab.evaluate(
            "[...document.querySelectorAll('[data-token]')]"
            ".map(c => c.style.backgroundColor).join()")
        return says(tab), colours, tab.locator(".vx-bar").inner_text()

    for name, value in CHANGES:
        before = seen()
        control(tab, name, value)
        assert seen() != before, name
        if name not in ("scale", "strength", "residual", "discard"):
            assert seen()[0] != before[0], f"{name} must be said"
    before = seen()
    tab.locator("input[type=radio]").nth(1).check(force=True)
    tab.wait_for_timeout(300)
    assert seen() != before
    assert "true" in tab.locator(".vx-answers").inner_text()


def test_a_head_is_chosen_by_its_picture(tab):
    third = tab.locator(".vx-heads button").nth(2)
    third.click()
    assert "head 3" in says(tab) and third.get_attribute("aria-pressed") == "true"
    third.click()
    assert "mean of all heads" in says(tab)


ROLLOUTS = [  # options as the page calls them, and as the package does
    ("", {}), ("heads: 'max'", {"head_fusion": "max"}), ("residual: 0.2", {"residual": 0.2}),
    ("residual: 0", {"residual": 0.0}), ("residual: 1", {"residual": 1.0}),
    ("start: 3", {"start_layer": 3}),
]


def near(shown, expected, atol):
    torch.testing.assert_close(shown, expected, atol=atol, rtol=0)


def test_its_numbers_are_the_packages(tab, shipped):
    lit, images, _ = shipped
    attention = capture_attention(lit, images[:1])
    packed = from_bytes(to_bytes(attention)).float()
    for layer in (0, LAYERS - 1):
        near(matrix(tab, f"e.attention({layer}, 'mean')"), attention[layer, 0].mean(0), 2e-3)
        near(matrix(tab, f"e.attention({layer}, 'max')"), packed[layer, 0].amax(0), 2e-3)
        near(matrix(tab, f"e.attention({layer}, '1')"), packed[layer, 0, 1], 2e-3)
    for ours, options in ROLLOUTS:
        shown = matrix(tab, f"e.rollout({{{ours}}})")
        near(shown, attention_rollout(attention, **options)[0], 1e-3)
    # of the smallest weights, where bytes are coarse
    least = matrix(tab, "e.rollout({heads: 'min'})")
    near(least, attention_rollout(attention, head_fusion="min")[0], 3e-3)
    near(least, attention_rollout(packed, head_fusion="min")[0], 1e-4)
    # of the same bytes: near the cut, rounding decides which of two equals goes
    for ratio in (0.3, 0.7, 0.95):
        shown = matrix(tab, f"e.rollout({{discardRatio: {ratio}}})")
        near(shown, attention_rollout(packed, discard_ratio=ratio)[0], 1e-3)


def test_two_on_a_page_with_registers_and_wide_pictures(browser, shipped, tmp_path):
    torch.manual_seed(0)
    model = ViT((8, 12), 4, num_classes=4, embed_dim=12, depth=2, num_heads=3, num_registers=2,
                pool="mean", class_token=True)
    wide = attention_explorer(model, torch.rand(2, 3, 8, 12))
    small = attention_explorer(*shipped[:2])
    both = wide.page().replace("</main>", f"{small.html}{wide.html}</main>")
    (tmp_path / "two.html").write_text(both, encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "two.html").as_uri())
    tab.wait_for_function(
        "[...document.querySelectorAll('vit-explorer .vx-says')]"
        ".filter(s => s.textContent).length === 3")
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    first = tab.locator("vit-explorer").first
    tokens = first.locator("[role=gridcell]").all_inner_texts()
    assert tokens[:3] == ["class token", "register 1", "register 2"]
    first.locator("[data-token='2']").click()
    assert "Register 2 (pinned)" in says(tab) and "pinned" not in says(tab, 1)
    tab.close()


def test_without_scripts_a_picture_stays(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    picture = tab.locator("vit-explorer img")
    assert picture.is_visible() and "first" in picture.get_attribute("alt")
    context.close()


def test_the_page_asks_for_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text
