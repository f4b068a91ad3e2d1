"""Pages of the site from what the repository holds: README, notebooks, reports, commands, modules.

Every page has the address of its file, with .html: links of the repository lead to pages as they are."""
import re
import sys
from argparse import _SubParsersAction
from base64 import b64decode
from html import escape, unescape
from pathlib import Path

import griffe
import nbformat
from mkdocs.structure.files import File

from evoprune_nb.paper.pages import clean_html, formula
from evoprune_nb.ui.cli import make_parser

sys.path.insert(0, str(Path(__file__).parent))
import slides

ROOT = Path(__file__).parent.parent
NBS, REPORTS, PACKAGE = ROOT / "nbs", ROOT / "reports", ROOT / "evoprune_nb"
PARTS = ("machine", "cluster", "judge", "baselines", "ship", "paper", "ui")  # in the order of the tour
MEDIA = {".png", ".svg", ".gif", ".pdf", ".csv", ".json", ".ipynb", ".tex"}
shown = {}  # name → HTML that is put into a page as it is


def raw(html: str) -> str:
    "Markdown that stands for some HTML."
    shown[name := f"shown-{len(shown)}"] = html
    return f'<div class="shown" id="{name}"></div>'


def on_page_content(html, page, **_):
    "Formulas as MathML, and HTML that was set aside."
    body = lambda match: unescape(match[2])
    html = re.sub(r'(?s)<(span) class="arithmatex">\\\((.*?)\\\)</span>', lambda m: formula(body(m)), html)
    html = re.sub(r'(?s)<(div) class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
                  lambda m: f'<div class="arithmatex">{formula(body(m), "block")}</div>', html)
    return re.sub(r'id="(shown-\d+)">', lambda m: ">" + shown[m[1]], html)


def linked(markdown: str) -> str:
    "Markdown whose links lead to pages, and that means the same to Python-Markdown as to Jupyter."
    markdown = re.sub(r"(\]\((?!https?:)[^)\s]*)\.(?:ipynb|html)(#[^)]*)?\)", r"\1.md\2)", markdown)
    markdown = re.sub(r"\]\(((?!https?:)[^)#\s]+)/\)", r"](\1/index.md)", markdown)
    markdown = markdown.replace("<details>", '<details markdown="1">')
    return re.sub(r"(?m)^(?![-*] |\d+\. |\s|$)(.+)\n(?=(?:[-*]|\d+\.) )", r"\1\n\n", markdown)


def fenced(text: str, kind: str) -> str:
    return f"````` {{ {kind} }}\n{text.rstrip()}\n`````"


def output_markdown(output, picture) -> str:
    "What a cell has printed or shown; `picture` stores one and returns its address."
    if output.output_type == "stream":
        return fenced(output.text, ".text .output")
    data = output.get("data", {})
    if "image/png" in data:
        return f"![figure]({picture(b64decode(data['image/png']))})"
    if "text/markdown" in data:
        return linked(data["text/markdown"])
    return raw(data["text/html"]) if "text/html" in data else fenced(data.get("text/plain", ""), ".text .output")


def joined(outputs) -> list:
    "What a cell has printed line by line is one output."
    together = []
    for output in outputs:
        if together and output.output_type == together[-1].output_type == "stream":
            together[-1].text += output.text
        else:
            together.append(output)
    return together


def notebook_markdown(path: Path, picture) -> str:
    "A notebook as Markdown, without what it hides; `#| code-fold: true` folds the code of a cell."
    parts = []
    for cell in nbformat.read(path, 4).cells:
        directives = re.findall(r"(?m)^#\| *([\w-]+)", cell.source)
        source = re.sub(r"(?m)^#\|.*\n?", "", cell.source).strip()
        if cell.cell_type == "markdown":
            parts.append(linked(cell.source))
        elif cell.cell_type == "code" and source and "hide" not in directives:
            exported = " .exported" * ("export" in directives)
            code = fenced(source, f".python{exported}")
            if "code-fold" in directives:
                code = f'<details class="folded" markdown="1"><summary>Code</summary>\n\n{code}\n\n</details>'
            parts += [code, *(output_markdown(o, picture) for o in joined(cell.outputs))]
    return "\n\n".join(parts)


def report_markdown(path: Path, picture) -> str:
    "A report, or the shelf of them, in the clothes of the site; `picture` stores one and returns its address."
    body = re.search(r"(?s)<main.*?>(.*)</main>", path.read_text(encoding="utf-8"))[1]
    body = re.sub(r'(?s)<script.*?</script>|<p class="screen">.*?</p>|<style.*?</style>|<a class="anchor-link".*?</a>', "", body)
    title = re.search(r"(?s)<h1.*?>(.*?)</h1>", body)
    body = body.replace(title[0], "", 1)
    if path.name == "report.html":
        body = clean_html(body)
    body = re.sub(r"data:image/png;base64,([\w+/=\s]+)", lambda found: picture(b64decode(found[1])), body)
    return f"# {clean_html(re.sub('<.*?>|¶', '', title[1]))}\n\n{raw(body)}"


def commands_markdown() -> str:
    "What every command says of itself."
    parser = make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, _SubParsersAction))
    parts = [f"## {name}\n\n{fenced(command.format_help(), '.text')}" for name, command in commands.choices.items()]
    return "\n\n".join(["# Command line", "`evoprune COMMAND --help` says the same.", *parts])


class Site:
    "Files of the site, and its table of contents."

    def __init__(self, config, files):
        self.config, self.files = config, files

    def add(self, uri: str, **what) -> str:
        self.files.append(File.generated(self.config, uri, **what))
        return uri

    def pictures(self, uri: str):
        "A function that adds a picture of a page, and returns its address."
        added = []

        def picture(png: bytes) -> str:
            added.append(self.add(f"{uri[:-3]}_files/{len(added)}.png", content=png))
            return "/".join(added[-1].split("/")[-2:])

        return picture

    def notebook(self, path: Path) -> str:
        uri = path.relative_to(ROOT).with_suffix(".md").as_posix()
        text = notebook_markdown(path, self.pictures(uri))
        if re.match(r"\d_", path.name):
            text = re.sub(r"\n\n> .*", rf"\g<0>\n\n[Slides](../../slides/{path.stem}.html)", text, count=1)
        return self.add(uri, content=text)

    def notebooks(self, pattern: str) -> list[str]:
        return [self.notebook(path) for path in sorted(NBS.glob(pattern))]

    def report(self, path: Path) -> str:
        uri = path.relative_to(ROOT).with_suffix(".md").as_posix()
        return self.add(uri, content=report_markdown(path, self.pictures(uri)))

    def api(self, path: Path) -> dict:
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        text = f"# {name}\n\n::: evoprune_nb.{name}\n"
        return {name: self.add(f"api/{name}.md", content=text)}

    def slides(self) -> None:
        for path in sorted(slides.TUTORIALS.glob("[1-9]_*.ipynb")):
            self.add(f"slides/{path.stem}.html", content=slides.page(path))

    def nav(self) -> list:
        course = [f"nbs/tutorials/{name}.ipynb" for name in ("hundred_lines", "[1-9]_*", "glossary")]
        parts = [{part: self.notebooks(f"{part}/[a-z]*.ipynb") + self.notebooks(f"{part}/[0-9]*.ipynb")} for part in PARTS]
        reports = [self.report(REPORTS / f"{name}.html") for name in ("index", "gallery")]
        reports += [self.report(path) for path in sorted(REPORTS.glob("*/report.html"))]
        modules = sorted(PACKAGE.rglob("[!_]*.py"), key=lambda path: (len(path.parts), path))
        return [
            {"Home": [self.add("README.md", content=linked((ROOT / "README.md").read_text())),
                      self.add("CHANGELOG.md", content=linked((ROOT / "CHANGELOG.md").read_text()))]},
            {"Learn": [self.notebook(NBS / "index.ipynb"),
                       *(uri for pattern in course for uri in self.notebooks(pattern.removeprefix("nbs/"))),
                       *self.notebooks("[rw]*.ipynb")]},  # runs, workbench
            {"Method": self.notebooks("[0-9]*.ipynb")},
            {"Around it": parts},
            {"Experiments": [*reports, {"Notebooks": self.notebooks("experiments/*.ipynb")}]},
            {"Reference": [{"Command line": self.add("commands.md", content=commands_markdown())},
                           *(self.api(path) for path in modules)]}]


def on_files(files, config):
    site = Site(config, files)
    config.mdx_configs["toc"]["slugify"] = lambda text, separator: text.replace(" ", separator)  # as Jupyter's
    for path in sorted(REPORTS.rglob("*")):
        if path.suffix in MEDIA:
            site.add(path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
    site.slides()
    config.nav = site.nav()
    return files


class Comments(griffe.Extension):
    "Parameters and fields are described by the comments beside them."

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        said = re.search(r"  # (.+)", attr.lines[0]) if attr.lines else None
        if said and not attr.docstring and not attr.name.startswith("_"):
            attr.docstring = griffe.Docstring(escape(said[1]), parent=attr)

    def on_function_instance(self, *, func: griffe.Function, **_) -> None:
        known = {parameter.name.lstrip('*') for parameter in func.parameters} - {"self"}
        lines = [re.match(r"\s+\*{0,2}(\w+)\b.*,?\s+# (.+)", line) for line in func.lines]
        said = [f"    {line[1]}: {escape(line[2])}" for line in lines if line and line[1] in known]
        if said and func.docstring:
            func.docstring.value += "\n\nArgs:\n" + "\n".join(said)
