"""Prepare docstrings for the site, which shows them as Markdown: links and inherited attributes."""

import inspect
import re
from functools import partial

import griffe

PACKAGE = "flax_local_attention"
FIELDS = f"{PACKAGE}.fields"

_NAME = re.compile(r"(?<![`\[])`([A-Za-z][\w.]*)`(?![`\]])")  # in backticks, single ones, and no link yet


class Docstrings(griffe.Extension):
    """Link names in backticks to their entries, and list all attributes of a module with their defaults."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Rewrite the docstrings of all public names."""
        for name in pkg.exports or []:
            public = pkg[name]
            target = public.final_target if public.is_alias else public
            if target.is_class:
                self._list_attributes(target)
            for each in (target, *target.members.values()):
                if not each.is_alias and each.docstring:
                    link = partial(self._link, each=each, owner=target, pkg=pkg)
                    each.docstring.value = _NAME.sub(link, each.docstring.value)

    def _link(self, match: re.Match, each: griffe.Object, owner: griffe.Object, pkg: griffe.Module) -> str:
        """Link `Name`, `Name.member` and, inside a class, `member`; leave arguments and other words as they are."""
        if each.is_function and match[1] in each.parameters:
            return match[0]
        name, _, member = match[1].partition(".")
        if name not in (pkg.exports or []):
            if not owner.is_class or member or name not in owner.all_members:
                return match[0]
            name, member = owner.name, name
        members = pkg[name].all_members
        if member and member not in members:
            return match[0]
        has_entry = member and members[member].docstring
        if member and not has_entry and name == owner.name:
            return match[0]  # a field of the class that the reader is looking at
        return f"[`{match[1]}`][{PACKAGE}.{name}{'.' + member if has_entry else ''}]"

    def _list_attributes(self, module: griffe.Class) -> None:
        """Add the attributes of a module's bases to its own, and to each its default."""
        bases = [base for base in module.mro() if base.module.path == FIELDS and base.docstring]
        if not bases or not module.docstring:
            return
        for base in bases:
            for name, member in base.members.items():
                if member.is_attribute and name not in module.members:
                    module.set_member(name, griffe.Alias(name, member, parent=module))
        text = inspect.cleandoc(module.docstring.value) + "\n"
        own = re.search(r"(?m)^Attributes:\n((?: .*\n|\n(?= ))*)", text)
        start, stop = own.span() if own else (len(text), len(text))
        inherited = [inspect.cleandoc(base.docstring.value).partition("Attributes:\n")[2].rstrip() for base in bases]
        items = "\n".join(filter(None, [own[1].rstrip() if own else "", *inherited])) + "\n"

        def with_default(item: re.Match) -> str:
            default = module.members[item[2]].value
            return item[0] if default is None else f"{item[1]} Default: ``{default}``.\n"

        items = re.sub(r"(?m)(^    (\w+): .*(?:\n {5,}.*)*)\n", with_default, items)
        module.docstring.value = f"{text[:start]}\nAttributes:\n{items}{text[stop:]}"
