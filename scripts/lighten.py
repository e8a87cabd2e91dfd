"Makes a built site lighter: unused rules leave its style sheets, unused icons its icon font."
import re
from pathlib import Path

import tinycss2
from fontTools import subset

WORD = re.compile(r"[\w-]+")
CLASS = re.compile(r"\.((?:\\.|[\w-])+)")
SKIPPED = {"skip_comments": True, "skip_whitespace": True}


def words_of(site: Path) -> set[str]:
    "Everything in pages and scripts that could be the name of a class."
    files = [file for ending in ("html", "js") for file in site.rglob(f"*.{ending}")]
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return {word for text in texts for word in WORD.findall(text)}


def is_used(selector: str, words: set[str]) -> bool:
    """Whether every class of a selector is somewhere in the site; what stands in brackets, as in
    `:not(.x)`, asks for none."""
    selector = re.sub(r"\([^()]*\)", "", selector)
    return all(name.replace("\\", "") in words for name in CLASS.findall(selector))


def used_rules(rules: list, words: set[str]) -> str:
    "The text of the rules that can apply to a page."
    kept = []
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = re.split(r",(?![^(]*\))", tinycss2.serialize(rule.prelude))
            selectors = [s.strip() for s in selectors if is_used(s.strip(), words)]
            if selectors:
                kept.append(f"{','.join(selectors)}{{{tinycss2.serialize(rule.content)}}}")
        elif rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports"):
            inside = used_rules(tinycss2.parse_rule_list(rule.content, **SKIPPED), words)
            if inside:
                kept.append(f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{inside}}}")
        elif rule.type == "at-rule":
            kept.append(rule.serialize())
    return "\n".join(kept)


def lighten_sheet(sheet: Path, words: set[str]) -> None:
    rules = tinycss2.parse_stylesheet(sheet.read_text(encoding="utf-8"), **SKIPPED)
    sheet.write_text(used_rules(rules, words), encoding="utf-8")


def lighten_icons(sheet: Path) -> None:
    "The icon font keeps the characters that its style sheet still names, in one file."
    text = sheet.read_text(encoding="utf-8")
    rules = re.sub(r'url\([^)]*woff2[^)]*\)\s*format\("woff2"\)\s*,', "", text)
    sheet.write_text(rules, encoding="utf-8")
    for file in (sheet.parent / "fonts").glob("*.woff2"):
        file.unlink()
    for file in (sheet.parent / "fonts").glob("*.woff"):
        options = subset.Options(flavor="woff", layout_features=[])
        font = subset.load_font(str(file), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(text="".join(re.findall(r'content:\s*"(.)"', text)))
        subsetter.subset(font)
        subset.save_font(font, str(file), options)


def lighten(site: Path) -> None:
    "The style sheets of themes and icons; what the project wrote itself stays as it is."
    words = words_of(site)
    for sheet in (site / "site_libs").glob("*/*.css"):
        lighten_sheet(sheet, words)
        if sheet.name.startswith("bootstrap-icons"):
            lighten_icons(sheet)
