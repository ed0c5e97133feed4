"""API pages from the library's source: signatures, docstrings, and the comment beside each parameter.

Nothing is imported, so no torch is needed.
"""

import ast
import io
import re
import textwrap
import tokenize


def prose(text):
    """A docstring or comment is plain text with code in backticks."""
    parts = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    return "".join(
        part if i % 2 else re.sub(r"([\\*_<$\[\]|])", r"\\\1", part) for i, part in enumerate(parts)
    )


def code(text):
    return f"`{text}`".replace("|", r"\|") if text else ""


def comments_of(source):
    """Line -> the comment that ends it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def parameters(function):
    """Name, annotation, default and last line of each parameter; the bare star is left to the signature."""
    args = function.args
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    for arg, default in [
        *zip(plain, defaults, strict=False),
        *zip(args.kwonlyargs, args.kw_defaults, strict=False),
    ]:
        if arg.arg not in ("self", "cls"):
            yield arg.arg, arg.annotation, default, (default or arg).end_lineno
    for star, arg in [("*", args.vararg), ("**", args.kwarg)]:
        if arg:
            yield star + arg.arg, arg.annotation, None, arg.end_lineno


def fields(cls):
    """The same for a class: what its constructor takes, or the fields of a dataclass."""
    init = next((n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init:
        yield from parameters(init)
    else:
        yield from (
            (n.target.id, n.annotation, n.value, n.end_lineno)
            for n in cls.body
            if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)
        )


def described(entries, returns, comments):
    """A table with a row per parameter, and one for what comes back."""
    rows = [
        (
            code(name),
            code(kind and ast.unparse(kind)),
            code(default and ast.unparse(default)),
            prose(comments.get(line, "")),
        )
        for name, kind, default, line in entries
    ]
    if returns and returns.end_lineno in comments:
        rows.append(("*returns*", code(ast.unparse(returns)), "", prose(comments[returns.end_lineno])))
    return (
        [
            "| parameter | type | default | |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
        if rows
        else []
    )


def returns_of(node):
    return f" -> {ast.unparse(node.returns).strip(chr(39))}" if node.returns else ""


def signature(name, node):
    """As one calls it, without types."""
    if isinstance(node, ast.FunctionDef) and any(
        ast.unparse(one).endswith("property") for one in node.decorator_list
    ):
        return "\n".join(["```python", f"{name}{returns_of(node)}", "```"])
    if isinstance(node, ast.FunctionDef):
        inner = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(untyped(node.args)))
        returns = returns_of(node)
    else:
        inner, returns = (
            ", ".join(f"{n}={ast.unparse(default)}" if default else n for n, _, default, _ in fields(node)),
            "",
        )
    lines = textwrap.wrap(f"{name}({inner}){returns}", 88, subsequent_indent="    ", break_long_words=False)
    return "\n".join(["```python", *lines, "```"])


def untyped(args):
    """The parameters without their annotations, which stand in the table."""
    bare = ast.parse(f"def f({ast.unparse(args)}): pass").body[0].args
    for arg in [*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg]:
        if arg:
            arg.annotation = None
    return bare


def entry(node, comments, level, prefix=""):
    """A function or class as Markdown; of a class also its public methods."""
    name, cls = prefix + node.name, isinstance(node, ast.ClassDef)
    lines = [
        f"{'#' * level} {node.name}",
        "",
        signature(name, node),
        "",
        prose(ast.get_docstring(node) or ""),
        "",
    ]
    lines += described(fields(node) if cls else parameters(node), None if cls else node.returns, comments)
    for method in node.body if cls else []:
        if (
            isinstance(method, ast.FunctionDef)
            and not method.name.startswith("_")
            and ast.get_docstring(method)
        ):
            lines += entry(method, comments, level + 1, f"{node.name}.")
    return lines


def constant(source, name):
    """The value of a literal at the top of a module."""
    assigned = (node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return next((ast.literal_eval(node.value) for node in assigned if node.targets[0].id == name), [])


def definitions(source):
    """Functions and classes of a module, in its order."""
    return [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def summary(source, name):
    """The first line of a docstring."""
    docs = next(ast.get_docstring(node) for node in definitions(source) if node.name == name)
    return prose(docs.splitlines()[0])


def page(name, source, notebook, first=()):
    """A module's page: what `__all__` names in the order of the source, `first` before the rest.

    `notebook` is a path under nbs.
    """
    public, comments = constant(source, "__all__"), comments_of(source)
    shown = [node for node in definitions(source) if node.name in public]
    lines = [
        f"# icu_nb.{name}",
        "",
        prose(ast.get_docstring(ast.parse(source)) or ""),
        "",
        f"Made in [{notebook.stem}](../nbs/{notebook.as_posix()}), which explains it and shows it at work.",
        "",
    ]
    for node in sorted(shown, key=lambda node: node.name not in first):
        lines += entry(node, comments, 2)
    return "\n".join(lines)
