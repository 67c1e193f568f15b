"""
What tests/matrix.py found, docs/compatibility_record.tsv, and the short tables that the pages docs/compatibility.md and
docs/compatibility_zh.md have of it.

    python tests/compatibility_page.py    write the tables anew from the record

A line of the record is one run of the tests with one release; no line is ever summed up or left out there. The page
has the releases in ranges, with a mark for each feature of COLUMNS.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "compatibility_record.tsv"
PAGES = {"": ROOT / "docs" / "compatibility.md", "zh": ROOT / "docs" / "compatibility_zh.md"}  # by language

RUNS = ("releases", "suite", "others", "newest", "newest-torch")
ALL, UNKNOWN = "all", "?"


class Row(NamedTuple):
    """
    A line of the record, as text.

    run: one of RUNS. "releases" ran the acceptance tests; "suite" is a release that only CI runs, with the whole suite.
    date: empty where it was not written down. passed: the number of tests, or "all" where they were not counted.
    failed: "0", or the number and the names. lacks: what the release can't do, by `conftest.lacks`, separated by "; ",
    or "?" where it was not written down.
    """

    run: str
    date: str
    python: str
    torch: str
    transformers: str
    passed: str
    failed: str
    lacks: str

    @property
    def reasons(self) -> list[str]:
        return [] if self.lacks in ("", UNKNOWN) else self.lacks.split("; ")


# A column of the table of releases: what works, the reasons of skips that say it does not, and those for its footnote.
COLUMNS = (
    ("cache objects", ("has no DynamicCache", "does not return the cache"), ()),
    ("prompt look-up", ("has no prompt look-up decoding",), ()),
    ("pipelines with messages", ("has no pipelines for messages",), ()),
    ("static cache", ("has no static cache for all layers",), ("makes no cache inside of a compiled call",)),
    ("drafts on a quantised cache", ("reads keys and values out of the cache to take draft tokens back",), ()),
    ("a message continued", ("continues no final message in a chat template",), ()),
    ("flex_attention", ("has no flex_attention",), ()),
    (
        "prefill in chunks",
        (
            "has no prefill in chunks",
            "always compiles a prefill in chunks, which does not attend to what is stored",
            "computes a prefill in chunks wrongly, with Qwen2 too",
        ),
        (),
    ),
    ("packed rows", ("has no packed rows",), ()),
    ("attention changed later", ("chooses the attention function when a model is made only",), ()),
    ("continuous batching", ("has no continuous batching",), ("has no continuous batching on a CPU",)),
)


# What the tables say, in Chinese; a reason that is not here is shown in English.
CHINESE = {
    "{} to {}": "{} 至 {}",
    "transformers": "transformers",
    "tests passed": "通过的测试",
    "failed": "失败",
    "; failed: ": "；失败：",
    ", ": "、",
    "; ": "；",
    "{}: {}": "{}：{}",
    "the whole suite, in CI": "CI 中的全部测试",
    "Python {}, torch {}. ✓ works, – this release can't": "Python {}，torch {}。✓ 可用，– 该版本做不到",
    ", · not recorded": "，· 没有记录",
    ".": "。",
    "What else a release of transformers does, or does not do:": "各版本 transformers 的其他情况：",
    "What only these runs skipped, with the releases of transformers:": "只有这些运行跳过的内容，以及版本：",
    "what this release can't do": "该版本做不到的",
    "Of {}:": "{}：",
    "cache objects": "缓存对象",
    "prompt look-up": "提示词查找",
    "pipelines with messages": "接收消息的 pipeline",
    "static cache": "静态缓存",
    "drafts on a quantised cache": "量化缓存上的草稿",
    "a message continued": "续写消息",
    "flex_attention": "flex_attention",
    "prefill in chunks": "分段预填充",
    "packed rows": "一行多个序列",
    "attention changed later": "加载后更换注意力",
    "continuous batching": "连续批处理",
    "makes no cache inside of a compiled call": "编译的调用中不能建立缓存",
    "has no continuous batching on a CPU": "CPU 上没有连续批处理",
    "counts draft tokens for the NTK scale of a prompt that they lift over a power of two": (
        "草稿 token 使提示词越过二的幂时，也被计入 NTK 的长度"
    ),
    "has no Qwen2 to compare with": "没有可供比较的 Qwen2",
    "breaks transformers_stream_generator": "与 transformers_stream_generator 不兼容",
    "takes quantised caches in a generation configuration for its own": "把生成配置中的量化缓存当作它自己的",
    "mixes up the rows of a batch with flash attention": "使用 flash attention 时会弄混批次中的行",
    "has no contrastive search of its own": "自身没有对比搜索",
    "lacks what transformers_stream_generator imports": "缺少 transformers_stream_generator 要导入的内容",
    "has fast tokenizers that always see special tokens": "快速分词器总是识别特殊 token",
    "has fast tokenizers that can't have a token which no merges lead to": "快速分词器不能含有无法由合并得到的 token",
    "has no DynamicCache for the pages of docs/": "没有 docs/ 的代码所用的 DynamicCache",
    "has no chat templates": "没有对话模板",
    "has no server for one checkpoint": "不能启动只服务一个检查点的服务",
    "has no tensor parallelism that takes other styles than its own": "张量并行只接受它自己的切分方式",
    "shows as added tokens only those beyond the vocabulary": "只把词表之外的 token 显示为新增 token",
    "takes no padding_side as an argument": "调用时不接受参数 padding_side",
    "does not compile generation on a CPU": "在 CPU 上不编译生成",
    "gives no gradients, or files, of fused projections under tensor parallelism": "张量并行得不到合并投影的梯度和文件",
}


def read(path: Path = RECORD) -> list[Row]:
    """The record; ValueError for a line with another number of fields, or a run that is not known."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    if header.split("\t") != list(Row._fields):
        raise ValueError(f"{path} must begin with the line {' '.join(Row._fields)!r}, found {header!r}.")
    rows = []
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        if len(fields) != len(Row._fields) or fields[0] not in RUNS:
            raise ValueError(f"{path}, line {number}: {len(Row._fields)} fields are wanted, the first of {RUNS}.")
        rows.append(Row(*fields))
    return rows


def write(rows: list[Row], path: Path = RECORD) -> None:
    fields = [" ".join(field.split()) for row in [Row(*Row._fields), *rows] for field in row]
    width = len(Row._fields)
    lines = ["\t".join(fields[i : i + width]) + "\n" for i in range(0, len(fields), width)]
    path.write_text("".join(lines), encoding="utf-8")


def record(rows: list[Row], path: Path = RECORD, pages: dict[str, Path] = PAGES) -> None:
    """
    Put the rows of a run, all of one, in place of those that the record has of it, and write the tables of the pages.
    What the matrix has run is no longer a release that only CI runs.
    """
    run, releases = rows[0].run, {row.transformers for row in rows}
    others = [row for row in read(path) if row.run != run]
    if run == "releases":
        others = [row for row in others if row.run != "suite" or row.transformers not in releases]
    write(sorted([*others, *rows], key=lambda row: RUNS.index(row.run)), path)
    for language, page in pages.items():
        write_page(read(path), language, page)


def write_page(rows: list[Row], language: str, page: Path) -> None:
    """Replace what stands between the page's marks of each section."""
    text = page.read_text(encoding="utf-8")
    for section, made in sections(rows, language).items():
        begin, end = f"<!-- {section} begins -->\n", f"<!-- {section} ends -->"
        before, rest = text.split(begin)
        text = before + begin + made + end + rest.split(end)[1]
    page.write_text(text, encoding="utf-8")


def sections(rows: list[Row], language: str = "") -> dict[str, str]:
    """The Markdown of each section of a page: in English, or with "zh" in Chinese."""

    def say(text: str) -> str:
        return CHINESE.get(text, text) if language == "zh" else text

    of = {run: [row for row in rows if row.run == run] for run in RUNS}
    return {
        "releases": releases_table(of["releases"], of["suite"], say),
        "others": others_table(of["others"], of["releases"], say),
        **{run: newest_table(of[run], say) for run in ("newest", "newest-torch")},
    }


def minor(release: str) -> str:
    """
    Example:
        >>> minor("4.32.1")
        '4.32'
    """
    return ".".join(release.split(".")[:2])


def span(rows: list[Row], say: Callable[[str], str]) -> str:
    """The releases of rows that follow each other: '4.32 to 4.35'."""
    first, last = minor(rows[0].transformers), minor(rows[-1].transformers)
    return first if first == last else say("{} to {}").format(first, last)


def spans_of(reason: str, rows: list[Row], say: Callable[[str], str]) -> str:
    """Where a reason holds: '4.53 to 5.0, 5.3 to 5.4'."""
    groups = itertools.groupby(rows, key=lambda row: reason in row.reasons)
    return say(", ").join(span(list(group), say) for holds, group in groups if holds)


def note(reason: str, rows: list[Row], say: Callable[[str], str]) -> str:
    """'4.53 to 5.0, 5.3 to 5.4: has no continuous batching on a CPU'."""
    return say("{}: {}").format(spans_of(reason, rows, say), say(reason))


def marks(row: Row) -> tuple[str, ...]:
    """A mark for each of COLUMNS."""
    if row.lacks == UNKNOWN:
        return ("·",) * len(COLUMNS)
    return tuple("–" if set(lacking) & set(row.reasons) else "✓" for _, lacking, _ in COLUMNS)


def releases_table(rows: list[Row], suite: list[Row], say: Callable[[str], str]) -> str:
    """
    Releases with the same marks in one row, footnotes of the columns, and what else a release can't do.

    rows: of the matrix, oldest first; suite: of releases that only CI runs; say: gives a text in the page's language.
    """
    if not rows:
        return ""
    shown = [*rows, *suite]
    seen = {reason for row in rows for reason in row.reasons}
    noted: list[str] = []
    heads = [say("transformers"), say("tests passed")]
    for name, _, reasons in COLUMNS:
        held = [reason for reason in reasons if reason in seen]
        noted += held
        heads.append(say(name) + "".join(f" [{noted.index(reason) + 1}]" for reason in held))
    table = [heads, ["---", "---", *[":-:"] * len(COLUMNS)]]
    for _, group in itertools.groupby(shown, key=lambda row: (row.run, marks(row), row.failed != "0")):
        same = list(group)
        if same[0].passed == ALL:
            count = say("the whole suite, in CI")
        else:
            passed = sorted({int(row.passed) for row in same})
            count = str(passed[0]) if len(passed) == 1 else say("{} to {}").format(passed[0], passed[-1])
        if same[0].failed != "0":
            failures = (say("{}: {}").format(row.transformers, row.failed) for row in same)
            count += say("; failed: ") + say("; ").join(failures)
        table.append([span(same, say), count, *marks(same[0])])
    legend = say("Python {}, torch {}. ✓ works, – this release can't").format(rows[0].python, rows[0].torch)
    if any(row.lacks == UNKNOWN for row in shown):
        legend += say(", · not recorded")
    lines = [legend + say("."), "", *_markdown(table), ""]
    lines += [f"[{i}] {note(reason, rows, say)}\n" for i, reason in enumerate(noted, start=1)]
    known = {reason for _, lacking, _ in COLUMNS for reason in lacking} | set(noted)
    rest = dict.fromkeys(reason for row in rows for reason in row.reasons if reason not in known)
    if rest:
        lines += [say("What else a release of transformers does, or does not do:"), ""]
        lines += [f"- {note(reason, rows, say)}" for reason in rest]
    return "\n".join(lines).rstrip("\n") + "\n"


def others_table(rows: list[Row], releases: list[Row], say: Callable[[str], str]) -> str:
    """Other Pythons and PyTorches, and what only these runs, which are of the whole suite, found lacking."""
    if not rows:
        return ""
    table = [["Python", "torch", "transformers", say("tests passed"), say("failed")], ["---"] * 5]
    table += [[row.python, row.torch, row.transformers, row.passed, row.failed] for row in rows]
    said = {reason for row in releases for reason in row.reasons}
    found = dict.fromkeys(reason for row in rows for reason in row.reasons if reason not in said)
    lines = _markdown(table)
    if found:
        lines += ["", say("What only these runs skipped, with the releases of transformers:"), ""]
    for reason in found:
        releases = say(", ").join(row.transformers for row in rows if reason in row.reasons)
        lines.append(f"- {say('{}: {}').format(releases, say(reason))}")
    return "\n".join(lines) + "\n"


def newest_table(rows: list[Row], say: Callable[[str], str]) -> str:
    if not rows:
        return ""
    heads = ["Python", "torch", "transformers", say("tests passed"), say("failed"), say("what this release can't do")]
    table = [heads, ["---"] * len(heads)]
    for row in rows:
        lacking = say("; ").join(map(say, row.reasons))
        table.append([row.python, row.torch, row.transformers, row.passed, row.failed, lacking])
    return "\n".join([say("Of {}:").format(rows[0].date), "", *_markdown(table)]) + "\n"


def _markdown(table: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in table]


if __name__ == "__main__":
    for language, page in PAGES.items():
        write_page(read(), language, page)
