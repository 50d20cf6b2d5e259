"""Recipes: the shipped ones against what was seen on the kernels, malformed ones, making one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ksmtrace.capture import resolve as resolving
from ksmtrace.capture import sites
from ksmtrace.capture.sites import Location, RecipeError, find_recipe, parse_recipe, read_recipe
from ksmtrace.cli.sites import sites as command
from ksmtrace.errors import BackendUnavailable, UsageError

BUILDS = {
    "5.10.223": "ad88061a5204bed40b632d94429548b7975f22e4",
    "5.10.262": "9bcfc2361bcccd68de7f4941e069bb6910665236",
    "6.1.176": "06f8bde30046985060c60820f7a11515a33afb06",
    "6.1.192": "eb4fbcd037e7253717950bf2b93bd5566f47c56f",
    "6.1.192-3": "6a2b4ac77585b8cf102cba771300e573c8489b69",
    "6.12.107": "9c54a8e41141472ef75c7d0bef45c721ad398682",
    "6.12.117": "b1d7a9114053a488ef493f85f85e9fc75ba9f632",
    "6.12.118": "67e5e727aeb3cb468dfe1bb8f9738f944c3a7d50",
    "7.2.12": "1eeabb9495d1c8f00f0ea93e0fc50f51c3d38e32",
    "7.2.13": "f8da1e460d1343b62f4a8880ae5ce63634756e7a",
    "7.3.4": "b3997c9bf954efcafed82ed219434f03b715f8df",
}

# Return offsets in ksm_scan_thread that were read out of disassemblies by hand and seen to be hit
# in guests with these kernels: callee, by the source in which function, offset by kernel.
TABLED_BUILDS = ("5.10.262", "6.1.192", "6.12.117", "7.2.12", "7.3.4")
TABLED: list[tuple[str, str, list[int | None]]] = [
    ("lru_add_drain_all", "scan_get_next_rmap_item", [0xB8D, 0xB10, 0xB57, 0x928, 0x93B]),
    ("walk_page_range_vma", "scan_get_next_rmap_item", [0x496, 0x209, 0x20B, 0x214, 0x214]),
    (
        "remove_rmap_item_from_tree",
        "should_skip_rmap_item",
        [None, None, 0x58B, 0x5AE, 0x37C],
    ),
    (
        "remove_rmap_item_from_tree",
        "get_next_rmap_item",
        [0x4DB, 0x5F4, 0x262, 0x26D, 0x274],
    ),
    (
        "remove_rmap_item_from_tree",
        "remove_trailing_rmap_items",
        [0x12E, 0x47C, 0x7CA, 0x7B1, 0x760],
    ),
    ("remove_rmap_item_from_tree", "cmp_and_merge_page", [None, None, 0x3A6, 0x3A8, 0x43C]),
    ("xxh64", "calc_checksum", [None, None, 0x3CB, 0x3CD, 0x463]),
    ("calc_checksum", "cmp_and_merge_page", [0x995, 0xA99, None, None, None]),
    ("__stable_node_chain", "stable_tree_search", [0x646, None, None, None, None]),
    ("get_ksm_page", "stable_tree_search", [0x892, 0x8D8, None, None, None]),
    ("get_ksm_page", "stable_tree_search", [0x68C, 0xEEB, None, None, None]),
    ("get_ksm_page", "stable_tree_search", [None, 0x843, None, None, None]),
    ("ksm_get_folio", "stable_tree_search", [None, None, 0xACC, 0xCC9, 0xD0E]),
    ("ksm_get_folio", "stable_tree_search", [None, None, 0x1168, 0x151E, 0x1228]),
    ("stable_node_dup", "stable_tree_search", [None, 0x9BD, 0xB3B, 0xD38, 0xD79]),
    ("memcmp_pages", "stable_tree_search", [0x5DE, 0x856, 0xADF, 0xCDC, 0xD21]),
    (
        "try_to_merge_with_ksm_page",
        "cmp_and_merge_page",
        [0x7EB, 0xDFB, 0xE59, 0x1248, 0x11D0],
    ),
    ("stable_tree_append", "cmp_and_merge_page", [0xDDB, 0x1560, 0x1724, 0x172E, 0x17E0]),
    ("try_to_merge_one_page", "cmp_and_merge_page", [0x17F5, 0x11D8, 0x14B2, 0xBF9, 0xC2B]),
    ("try_to_merge_one_page", "cmp_and_merge_page", [None, None, 0x1FF6, None, None]),
    ("follow_page", "unstable_tree_search_insert", [0xA60, 0x1271, None, None, None]),
    ("folio_walk_start", "unstable_tree_search_insert", [None, None, 0xF6C, 0x1020, 0xF5B]),
    ("memcmp_pages", "unstable_tree_search_insert", [0xAB1, 0x12E4, 0xFE9, 0x109D, 0xFD8]),
    (
        "try_to_merge_with_ksm_page",
        "try_to_merge_two_pages",
        [0x1401, 0x1B0F, 0x1BB8, 0x18BB, 0x1952],
    ),
    (
        "try_to_merge_with_ksm_page",
        "try_to_merge_two_pages",
        [0x1778, 0x1B2C, 0x1BD7, 0x18D5, 0x196C],
    ),
    ("break_cow", "try_to_merge_two_pages", [0x178B, 0x2204, 0x1E3B, 0x1C67, 0x1B0A]),
    ("memcmp_pages", "stable_tree_insert", [0x1513, 0x1C84, 0x1D4D, 0x1A2B, 0x1A4E]),
    (
        "alloc_stable_node_chain",
        "stable_tree_insert",
        [0x16D6, 0x1F1B, 0x1F23, 0x1B3C, 0x1B9E],
    ),
    ("stable_tree_append", "cmp_and_merge_page", [0x173F, 0x1F74, 0x1F8B, 0x1BA8, 0x1C01]),
    ("stable_tree_append", "cmp_and_merge_page", [0x174C, 0x1F82, 0x1F9A, 0x1BB8, 0x1C0F]),
    ("break_cow", "cmp_and_merge_page", [0x1881, 0x1FB6, 0x20EB, 0x1BEF, 0x1C6D]),
    ("break_cow", "cmp_and_merge_page", [0x1889, 0x1FBF, 0x20F5, 0x1BF9, 0x1C76]),
]
INLINED_EVERYWHERE = (
    "cmp_and_merge_page",
    "stable_tree_search",
    "unstable_tree_search_insert",
    "try_to_merge_two_pages",
    "stable_tree_insert",
)


def plain_recipe() -> dict[str, Any]:
    """A small recipe that is valid, as plain JSON types."""
    return {
        "format": 1,
        "build_id": "00112233445566778899aabbccddeeff00112233",
        "release": "6.1.0",
        "version": "#1 SMP",
        "sites": [
            {
                "function": "cmp_and_merge_page",
                "symbol": "ksm_scan_thread",
                "offset": 1659,
                "arguments": {"rmap_item": {"register": "sp", "offset": 24}},
                "surrounding": {"mm": {"register": "r8"}, "folio": {"register": "cx", "add": -40}},
                "frames": [["cmp_and_merge_page", 2050], ["ksm_scan_thread", 2480]],
            }
        ],
        "calls": [
            {
                "callee": "memcmp_pages",
                "symbol": "ksm_scan_thread",
                "return_offset": 2134,
                "frames": [["stable_tree_search", 1633], ["ksm_scan_thread", 2480]],
            }
        ],
    }


def parsed(document: Any) -> sites.Recipe:
    return parse_recipe(json.dumps(document), "x.json", plain_recipe()["build_id"])


@pytest.fixture
def no_user_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that the user's recipes would be in."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "ksmtrace" / "recipes"


def test_every_supported_build_has_a_recipe(no_user_recipes: Path) -> None:
    for version, build_id in BUILDS.items():
        recipe = find_recipe(build_id)
        assert recipe is not None
        assert recipe.build_id == build_id
        assert re.search(rf"Debian {re.escape(version)}\b", recipe.version)
        assert recipe.release.endswith("-amd64")


def test_every_shipped_recipe_is_valid_and_written_as_read() -> None:
    recipes = sites.shipped_recipes()
    assert {recipe.build_id for recipe in recipes} >= set(BUILDS.values())
    for recipe in recipes:
        again = parse_recipe(recipe.as_text(), "again", recipe.build_id)
        assert again == recipe


@pytest.mark.parametrize("column", range(len(TABLED_BUILDS)), ids=TABLED_BUILDS)
def test_calls_are_where_they_were_seen(no_user_recipes: Path, column: int) -> None:
    recipe = find_recipe(BUILDS[TABLED_BUILDS[column]])
    assert recipe is not None
    for callee, function, offsets in TABLED:
        offset = offsets[column]
        if offset is not None:
            call = recipe.call_at("ksm_scan_thread", offset)
            assert call is not None, (callee, hex(offset))
            assert call.callee == callee
            assert call.is_within(function), (callee, hex(offset), call.frames)
            assert call.is_within("ksm_do_scan")


@pytest.mark.parametrize("build_id", BUILDS.values(), ids=BUILDS)
def test_functions_inlined_everywhere_have_one_site_each(
    no_user_recipes: Path, build_id: str
) -> None:
    recipe = find_recipe(build_id)
    assert recipe is not None
    for function in INLINED_EVERYWHERE:
        (site,) = recipe.sites_of(function)
        assert site.symbol == "ksm_scan_thread"
        assert site.frames[0].function == function
    # What every build tells where it matters: whose item, and where it was found to be equal.
    assert recipe.sites_of("cmp_and_merge_page")[0].location("rmap_item") is not None
    (pair,) = recipe.sites_of("try_to_merge_two_pages")
    assert {"rmap_item", "tree_rmap_item", "tree_page"} <= set(pair.arguments)


def test_the_example_that_perf_probe_prints(no_user_recipes: Path) -> None:
    recipe = find_recipe(BUILDS["6.1.192"])
    assert recipe is not None
    (site,) = recipe.sites_of("cmp_and_merge_page")
    assert site.offset == 1659
    assert site.arguments == {"rmap_item": Location("sp", 24, in_memory=True)}
    assert site.arguments["rmap_item"].fetch_argument == "+24(%sp)"


def test_a_sum_is_not_memory(no_user_recipes: Path) -> None:
    # rb_entry() of the tree's node: perf probe prints -40(%cx), which kprobe events read as memory.
    recipe = find_recipe(BUILDS["6.1.192"])
    assert recipe is not None
    (site,) = recipe.sites_of("try_to_merge_two_pages")
    location = site.arguments["tree_rmap_item"]
    assert location == Location("cx", -40, in_memory=False)
    assert location.fetch_argument is None
    assert Location("r8").fetch_argument == "%r8"


def test_calls_to_come_in_the_order_of_the_source(no_user_recipes: Path) -> None:
    recipe = find_recipe(BUILDS["6.1.192"])
    assert recipe is not None
    steps = recipe.calls_to("try_to_merge_with_ksm_page", within="try_to_merge_two_pages")
    assert [call.return_offset for call in steps if call.caller == "try_to_merge_two_pages"] == [
        0x1B0F,
        0x1B2C,
    ]
    assert recipe.calls_to("no_such_function") == ()


def test_an_unknown_build_has_no_recipe(no_user_recipes: Path) -> None:
    assert find_recipe("0" * 40) is None
    assert find_recipe(None) is None
    assert find_recipe("../../../etc/passwd") is None


def test_a_recipe_of_ones_own_goes_before_the_shipped_one(no_user_recipes: Path) -> None:
    document = plain_recipe()
    document["build_id"] = BUILDS["6.1.192"]
    own = parse_recipe(json.dumps(document), "own", BUILDS["6.1.192"])
    path = sites.write_recipe(own, no_user_recipes)
    assert path == no_user_recipes / f"{BUILDS['6.1.192']}.json"
    assert [file.name for file in no_user_recipes.iterdir()] == [path.name]
    assert find_recipe(BUILDS["6.1.192"]) == own
    assert read_recipe(path) == own


def test_a_relative_data_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    assert sites.user_directory() == Path.home() / ".local/share/ksmtrace/recipes"


def test_a_file_with_another_builds_name_is_refused(no_user_recipes: Path) -> None:
    no_user_recipes.mkdir(parents=True)
    (no_user_recipes / f"{'0' * 40}.json").write_text(json.dumps(plain_recipe()))
    with pytest.raises(RecipeError, match="is refused: it is the recipe of build 0011") as caught:
        find_recipe("0" * 40)
    assert caught.value.exit_status == 3
    assert caught.value.hint


def test_a_broken_recipe_of_ones_own_is_not_passed_over(no_user_recipes: Path) -> None:
    no_user_recipes.mkdir(parents=True)
    (no_user_recipes / f"{BUILDS['6.1.192']}.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        find_recipe(BUILDS["6.1.192"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, '{"format": NaN}'],
    ids=["empty", "open", "list", "null", "key twice", "deep", "NaN"],
)
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^x\.json is no valid recipe: "):
        parse_recipe(text, "x.json", plain_recipe()["build_id"])


SITE, CALL = ("sites", 0), ("calls", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "format is 2"),
        (("format",), True, "format is True"),
        (("build_id",), "XYZ", "build_id is 'XYZ'"),
        (("release",), 6.1, "release is 6.1"),
        (("version",), "a\nb", "version is"),
        (("extra",), 1, "unknown key 'extra'"),
        (("sites",), {}, "sites is not a list"),
        ((*SITE,), [], r"sites\[0\] is not an object"),
        ((*SITE, "offset"), -1, r"sites\[0\]\.offset is -1"),
        ((*SITE, "offset"), "1659", r"sites\[0\]\.offset is '1659'"),
        ((*SITE, "offset"), True, r"sites\[0\]\.offset is True"),
        ((*SITE, "symbol"), "a b", r"sites\[0\]\.symbol is 'a b'"),
        ((*SITE, "symbol"), "run_store", "does not end with run_store"),
        ((*SITE, "function"), "break_cow", "does not begin with break_cow"),
        ((*SITE, "frames"), [], "does not end with ksm_scan_thread"),
        ((*SITE, "frames", 0), ["cmp_and_merge_page"], "not a pair"),
        ((*SITE, "frames", 0), ["cmp_and_merge_page", 1.5], "is 1.5"),
        ((*SITE, "arguments"), [], "arguments is not an object"),
        ((*SITE, "arguments", "x y"), {"register": "ax"}, "is 'x y'"),
        ((*SITE, "arguments", "rmap_item"), {"register": "eax"}, "no register"),
        ((*SITE, "arguments", "rmap_item"), {"register": []}, "no register"),
        ((*SITE, "arguments", "rmap_item"), {"offset": 1}, "not an object with a register"),
        ((*SITE, "arguments", "rmap_item"), {"register": "ax", "add": 1, "offset": 1}, "unknown"),
        ((*SITE, "arguments", "rmap_item"), {"register": "ax", "offset": 1 << 40}, "whole number"),
        ((*CALL, "return_offset"), 0, r"return_offset is 0"),
        ((*CALL, "callee"), None, "callee is None"),
        ((*CALL, "frames"), [["memcmp_pages", 1]], "does not end with ksm_scan_thread"),
    ],
)
def test_a_departure_from_the_form_is_named(
    path: tuple[Any, ...], value: Any, message: str
) -> None:
    document: Any = plain_recipe()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(RecipeError, match=message) as caught:
        parsed(document)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", list(plain_recipe()))
def test_a_missing_key_is_named(key: str) -> None:
    document = plain_recipe()
    del document[key]
    with pytest.raises(RecipeError, match=f"lacks '{key}'"):
        parsed(document)


@pytest.mark.parametrize("rows", ["sites", "calls"])
def test_the_same_row_twice_is_refused(rows: str) -> None:
    document = plain_recipe()
    document[rows] *= 2
    with pytest.raises(RecipeError, match="twice"):
        parsed(document)


def test_the_list_marks_refused_files(no_user_recipes: Path) -> None:
    no_user_recipes.mkdir(parents=True)
    (no_user_recipes / "nonsense.json").write_text("{}")
    own = parsed(plain_recipe())
    sites.write_recipe(own, no_user_recipes)
    done = CliRunner().invoke(command, ["list", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [entry["file"] for entry in document["refused"]] == [
        str(no_user_recipes / "nonsense.json")
    ]
    listed = {entry["build_id"]: entry["file"] for entry in document["recipes"]}
    assert listed[own.build_id] == str(no_user_recipes / f"{own.build_id}.json")
    assert listed[BUILDS["7.3.4"]] is None
    text = CliRunner().invoke(command, ["list"])
    assert f"{own.build_id}      1      1  " in text.stdout
    assert "nonsense.json is no valid recipe" in text.stderr


# A kernel in miniature: what resolve() reads of a vmlinux, in some hundred bytes of code.
KSM_C = """
const char linux_banner[] __attribute__((used)) =
    "Linux version 9.9.9-test (me@here) (gcc 12) #7 SMP Today\\n";
struct rmap_item { long rmap_list, nid, mm, address, oldchecksum, node; };
__attribute__((noinline)) void break_cow(struct rmap_item *rmap_item) { asm volatile(""); }
__attribute__((noinline)) int memcmp_pages(void *a, void *b) { asm volatile(""); return a == b; }
static inline __attribute__((always_inline)) int stable_tree_search(void *page, void *other)
{
    asm volatile("nop");
    return memcmp_pages(page, other);
}
static inline __attribute__((always_inline)) void cmp_and_merge_page(
    void *page, struct rmap_item *rmap_item)
{
    asm volatile("nop");
    if (stable_tree_search(page, rmap_item))
        break_cow(rmap_item);
    asm volatile("" :: "r"(rmap_item), "r"(page));
}
__attribute__((noinline)) int ksm_scan_thread(void *page, long *node)
{
    cmp_and_merge_page(page, (struct rmap_item *)((char *)node - 40));
    asm volatile("" :: "r"(node));
    return 0;
}
void _start(void) { ksm_scan_thread(0, 0); }
"""


def build(directory: Path, *flags: str, source: str = KSM_C) -> Path:
    """Compile and link a kernel in miniature."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    (directory / "mm").mkdir(exist_ok=True)
    (directory / "mm" / "ksm.c").write_text(source)
    command = ["gcc", "-O2", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pie"]
    command += ["-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-Wl,--build-id=sha1"]
    subprocess.run([*command, *flags, "-o", "vmlinux", "mm/ksm.c"], cwd=directory, check=True)
    return directory / "vmlinux"


def need_perf() -> None:
    if shutil.which("perf") is None:
        pytest.skip("perf is not installed")


@pytest.mark.parametrize("flags", [("-gdwarf-4",), ("-gdwarf-5",), ("-gdwarf-5", "-gz=zlib")])
def test_a_recipe_is_made_from_debug_information(tmp_path: Path, flags: tuple[str, ...]) -> None:
    need_perf()
    vmlinux = build(tmp_path, *flags)
    recipe = resolving.resolve(vmlinux)
    assert (recipe.release, recipe.version) == ("9.9.9-test", "#7 SMP Today")
    notes = subprocess.run(["readelf", "-n", vmlinux], capture_output=True, text=True, check=True)
    assert f"Build ID: {recipe.build_id}" in notes.stdout
    assert [site.function for site in recipe.sites] == ["cmp_and_merge_page", "stable_tree_search"]
    outer, inner = recipe.sites
    lines = KSM_C.splitlines()
    call_line = next(n for n, line in enumerate(lines, 1) if "if (stable_tree_search" in line)
    assert [frame.function for frame in inner.frames] == [
        "stable_tree_search",
        "cmp_and_merge_page",
        "ksm_scan_thread",
    ]
    assert inner.frames[1].line == call_line
    # The caller's second argument less 40: a sum, which is not what memory at that place holds.
    place = outer.location("rmap_item")
    assert place is not None and not place.in_memory
    calls = {call.callee: call for call in recipe.calls}
    assert set(calls) == {"memcmp_pages", "break_cow"}
    assert calls["memcmp_pages"].caller == "stable_tree_search"
    assert calls["break_cow"].caller == "cmp_and_merge_page"
    assert outer.offset < inner.offset < calls["memcmp_pages"].return_offset
    assert lines[calls["memcmp_pages"].frames[0].line - 1].strip().startswith("return memcmp_pages")


def refusal(vmlinux: Path) -> UsageError:
    need_perf()
    with pytest.raises(UsageError) as caught:
        resolving.resolve(vmlinux)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return caught.value


def test_what_cannot_be_resolved_says_why(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no kernel")
    assert "is no ELF file" in str(refusal(text))
    assert "bzImage" in str(refusal(text).hint)
    text.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(20))
    assert "is no ELF file" in str(refusal(text))
    assert "cannot be read" in str(refusal(tmp_path))
    assert "No such file" in str(refusal(tmp_path / "absent"))
    assert "no debug information" in str(refusal(build(tmp_path)))
    whole = build(tmp_path, "-g")
    subprocess.run(["objcopy", "--only-keep-debug", whole, tmp_path / "apart"], check=True)
    assert "none of the code" in str(refusal(tmp_path / "apart"))
    assert "no 64-bit symbol table" in str(refusal(build(tmp_path, "-g", "-s")))
    assert "no build-id" in str(refusal(build(tmp_path, "-g", "-Wl,--build-id=none")))
    without = KSM_C.replace("ksm_scan_thread", "some_thread")
    assert "no mm/ksm.c" in str(refusal(build(tmp_path, "-g", source=without)))


def test_without_perf_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match="perf is not installed") as caught:
        resolving.resolve(tmp_path / "vmlinux")
    assert caught.value.exit_status == 3
    assert "linux-perf" in str(caught.value.hint)


def test_the_command_writes_under_the_build_id(tmp_path: Path, no_user_recipes: Path) -> None:
    need_perf()
    vmlinux = build(tmp_path, "-g")
    done = CliRunner().invoke(command, ["resolve", str(vmlinux)])
    assert done.exit_code == 0, done.output
    (path,) = no_user_recipes.iterdir()
    assert done.stdout == f"{path}\n"
    assert read_recipe(path).build_id == path.stem
