"""Formats of quantised outputs: arithmetic against torch's cast, brute force and definitions; layouts."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from math import inf, nan

import pytest
import torch
from ulps import same_bits

from tpfuse import quant
from tpfuse.errors import InvalidArgument
from tpfuse.quant import FORMATS, MXFP8, NVFP4, FP8PerGroup, FP8PerToken, FP8Static

GIVEN = torch.tensor([0.05])
formats = pytest.mark.parametrize("name", FORMATS)
SCALED = ("fp8_per_token", "fp8_per_group", "mxfp8", "nvfp4")  # by what they hold, in row-major layout


def made(name):
    return FORMATS[name](GIVEN)


def rows(count=7, width=384, dtype=torch.bfloat16):
    """Each row of another size, with large and small elements."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(count, width, generator=generator) * 10.0 ** torch.randint(-3, 3, (count, 1), generator=generator)
    x[:, ::9] *= 30
    return x.to(dtype)


def every(dtype):
    """All numbers of a 16-bit type."""
    return torch.arange(-32768, 32768).to(torch.int16).view(dtype)


def bits(x):
    return x.view(torch.uint8)


# Conversions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_e4m3_is_the_cast_of_torch_in_range(dtype):
    x = every(dtype).float()
    x = x[x.abs() <= 448]
    assert torch.equal(bits(quant.to_e4m3(x)), bits(x.to(torch.float8_e4m3fn)))


@pytest.mark.parametrize(
    ("x", "code"), [(449.0, 0x7E), (1e9, 0x7E), (inf, 0x7E), (-inf, 0xFE), (nan, 0x7F), (-0.0, 0x80), (-1e-9, 0x80)]
)
def test_e4m3_saturates_and_has_one_nan(x, code):
    assert int(bits(quant.to_e4m3(torch.tensor(x)))) == code
    assert int(bits(quant.to_e4m3(-torch.tensor(nan)))) == 0x7F


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_e2m1_is_the_nearest_number_and_a_tie_goes_to_the_even_code(dtype):
    x = every(dtype).double()
    x = x[~x.isnan()]
    numbers = torch.tensor(quant.E2M1, dtype=torch.float64)
    distance = (x.abs().clamp(max=1e3).unsqueeze(-1) - numbers).abs()
    odd = torch.arange(8) % 2 * 1e-12  # of two that are as near, the even one; 16-bit numbers are further apart
    nearest = (distance + odd).argmin(-1)
    assert torch.equal(quant.to_e2m1(x.float()).long(), nearest + 8 * x.signbit())


def test_e2m1_of_nan_is_six():
    assert quant.to_e2m1(torch.tensor([nan, -nan])).tolist() == [7, 7]


# Scales


def test_a_given_scale_is_what_torch_and_vllm_make_of_it():
    x = rows()
    got, scale = FP8Static(GIVEN).encode(x)
    assert scale is GIVEN
    assert torch.equal(bits(got), bits((x.float() * GIVEN.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)))


def test_a_token_is_scaled_so_that_its_largest_element_is_the_largest_number():
    x = rows()
    got, scale = FP8PerToken().encode(x)
    amax = x.float().abs().amax(-1, keepdim=True)
    assert torch.equal(scale, amax / 448)
    assert torch.equal(bits(got), bits((x.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)))
    assert (got.float().abs().amax(-1) == 448).all()


@pytest.mark.parametrize(
    ("fmt", "least"), [(FP8PerToken(), 1 / (448 * 512)), (FP8PerGroup(), 1e-10 / 448)], ids=["token", "group"]
)
def test_the_scale_of_zeros_is_a_small_number(fmt, least):
    got, scale = fmt.encode(torch.zeros(2, 256))
    assert torch.allclose(scale, torch.full_like(scale, least), rtol=1e-6, atol=0)
    assert not bits(got).any()


def test_a_group_is_scaled_as_if_it_were_a_token():
    x = rows()
    got, scale = FP8PerGroup().encode(x)
    alone, of_one = FP8PerToken().encode(x.unflatten(-1, (3, 128)))
    assert torch.equal(bits(got), bits(alone.flatten(-2)))
    assert torch.equal(scale, of_one.squeeze(-1))


def test_mxfp8_takes_the_least_power_of_two_that_does_not_saturate():
    exponents = torch.arange(-127, 128).double()
    edges = 448 * 2.0 ** torch.arange(-20, 20)  # exactly the largest number: no larger scale is needed
    x = torch.cat([rows(20, 32, torch.float32), *(torch.full((1, 32), float(e)) for e in edges)])
    x = torch.cat([x, x.nextafter(torch.tensor(inf))])
    got, scale = MXFP8().encode(x)
    fits = 448 * 2.0**exponents >= x.double().abs().amax(-1, keepdim=True)
    least = exponents[fits.int().argmax(-1)]
    assert torch.equal(scale.squeeze(-1), (least + 127).to(torch.uint8))
    exact = x.double() / 2.0 ** least.unsqueeze(-1)
    assert torch.equal(bits(got), bits(exact.float().to(torch.float8_e4m3fn)))


def test_mxfp8_scales_are_what_torch_calls_e8m0():
    got, scale = MXFP8().encode(rows())
    assert torch.equal(scale.view(torch.float8_e8m0fnu).float(), MXFP8().unpack(got, scale)[1])


@pytest.mark.parametrize(("amax", "code"), [(0.0, 0), (1e-45, 0), (3e38, 247), (inf, 247), (nan, 255)])
def test_mxfp8_scales_of_extreme_groups(amax, code):
    x = torch.zeros(1, 32)
    x[0, 5] = amax
    got, scale = MXFP8().encode(x)
    assert scale.tolist() == [[code]]
    assert (
        same_bits(MXFP8().decode(got, scale)[0, 5], torch.tensor(amax if amax in (0, inf) else nan)) or 0 < amax < inf
    )


def test_nvfp4_scales_are_rounded_to_e4m3_and_elements_scaled_by_what_was_stored():
    x, top = rows(), 448.0 * 6
    fmt = NVFP4(torch.tensor(top / 500), swizzled=False)
    got, scale = fmt.encode(x)
    amax = x.float().unflatten(-1, (-1, 16)).abs().amax(-1)
    assert torch.equal(bits(scale), bits((fmt.global_scale * (amax * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)))
    codes = torch.stack((got & 15, got >> 4), -1).flatten(-2)  # the first of a pair is the low half
    stored = (scale.double() / fmt.global_scale.double()).repeat_interleave(16, -1)
    ratio = (x.double() / stored).nan_to_num(0.0)
    distance = (ratio.abs().unsqueeze(-1) - torch.tensor(quant.E2M1, dtype=torch.float64)).abs()
    chosen = distance.gather(-1, (codes & 7).long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distance.amin(-1) + ratio.abs() * 2.0**-22).all()  # nearest, but for fp32 rounding of the ratio


def test_nvfp4_groups_that_are_too_small_for_a_scale_are_zero():
    x = torch.full((1, 32), 1e-6)
    x[0, 16:] = 1.0
    got, scale = NVFP4(torch.ones(1), swizzled=False).encode(x)
    assert scale.float()[0, 0] == 0
    assert not got[0, :8].any()
    assert got[0, 8:].all()


# What bytes stand for

# Half the distance of neighbouring numbers, relative to the element, and where they are denser, to the scale. NVFP4:
# scales have 3 bits of mantissa themselves, and one that was rounded down saturates.
BOUNDS = {"fp8": (2.0**-4, 2.0**-10), "mxfp8": (2.0**-4, 2.0**-10), "nvfp4": (0.25, 0.25)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@formats
def test_decoded_rows_are_near_the_rows(name, dtype):
    x = rows(dtype=dtype)
    given = x.float().abs().max() / 448 if name == "fp8_static" else 448 * 6 / x.float().abs().max()
    fmt = FORMATS[name](given)
    got, scale = fmt.encode(x)
    relative, absolute = BOUNDS[fmt.kind.partition("_")[0]]
    factor = fmt.unpack(got, scale)[1].double().repeat_interleave(fmt.group or 384, -1)
    small = absolute * factor.expand(x.shape) if factor.numel() > 1 else absolute * factor
    error = (fmt.decode(got, scale).double() - x.double()).abs()
    floor = 2.0**-10 / given * 6 if fmt.kind == "nvfp4" else 0  # of a group whose scale is 0, or nearly
    assert (error <= 1.0001 * (relative * x.double().abs() + small + floor)).all()


@formats
def test_a_row_is_quantised_alike_whatever_is_beside_it(name):
    fmt, x = made(name), rows(200)
    quantised = [fmt.decode(*fmt.encode(part)) for part in (x, x[3:4], x[129:200])]
    assert torch.equal(quantised[1], quantised[0][3:4])
    assert torch.equal(quantised[2], quantised[0][129:200])


@pytest.mark.parametrize("name", SCALED)
def test_a_nan_spoils_what_its_scale_covers_and_nothing_else(name):
    fmt, x = made(name), rows(2, 256)
    x[0, 130] = nan
    nans = fmt.decode(*fmt.encode(x)).isnan()
    start, end = (130 // fmt.group * fmt.group, (130 // fmt.group + 1) * fmt.group) if fmt.group else (0, 256)
    assert nans[0, start:end].all()
    assert int(nans.sum()) == end - start


def test_infinity_saturates_where_the_scale_is_given_and_spoils_what_it_scales_elsewhere():
    x = rows(1, 256)
    x[0, 0] = inf
    decoded = {name: made(name).decode(*made(name).encode(x)) for name in ("fp8_static", *SCALED)}
    assert decoded["fp8_static"][0, 0] == 448 * GIVEN
    assert decoded["nvfp4"][0, 0] == 448 * 6 * (1 / GIVEN)
    assert decoded["mxfp8"][0, 0] == inf
    assert decoded["mxfp8"].isfinite().sum() == 255
    assert decoded["fp8_per_token"].isnan().all()
    assert decoded["fp8_per_group"].isnan().sum() == 128


# Layouts


@formats
@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,), (128,)], ids=str)
def test_empty_is_like_what_encode_makes(name, lead):
    fmt, x = made(name), torch.zeros(*lead, 256)
    for a, b in zip(fmt.empty(x), fmt.encode(x), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize(
    ("name", "quant_dtype", "quant_width", "scale_dtype", "scale_shape", "scale_strides"),
    [
        ("fp8_static", torch.float8_e4m3fn, 256, torch.float32, (1,), (1,)),
        ("fp8_per_token", torch.float8_e4m3fn, 256, torch.float32, (5, 1), (1, 1)),
        ("fp8_per_group", torch.float8_e4m3fn, 256, torch.float32, (5, 2), (2, 1)),
        ("fp8_per_group_column_major", torch.float8_e4m3fn, 256, torch.float32, (5, 2), (1, 5)),
        ("fp8_per_group_tma_aligned", torch.float8_e4m3fn, 256, torch.float32, (5, 2), (1, 8)),
        ("mxfp8", torch.float8_e4m3fn, 256, torch.uint8, (5, 8), (8, 1)),
        ("mxfp8_swizzled", torch.float8_e4m3fn, 256, torch.uint8, (128, 8), (8, 1)),
        ("nvfp4", torch.uint8, 128, torch.float8_e4m3fn, (5, 16), (16, 1)),
        ("nvfp4_swizzled", torch.uint8, 128, torch.float8_e4m3fn, (128, 16), (16, 1)),
    ],
)
def test_shapes_and_dtypes(name, quant_dtype, quant_width, scale_dtype, scale_shape, scale_strides):
    got, scale = made(name).encode(rows(5, 256))
    assert (got.dtype, tuple(got.shape)) == (quant_dtype, (5, quant_width))
    assert (scale.dtype, tuple(scale.shape), scale.stride()) == (scale_dtype, scale_shape, scale_strides)


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (128, 4), (129, 4), (300, 7)])
def test_swizzled_scales_lie_where_the_formula_says(count, groups):
    scale = torch.randint(1, 256, (count, groups), dtype=torch.uint8)
    flat, tiles = quant.swizzle(scale).flatten(), -(-groups // 4)
    padding = flat.clone()
    for r in range(count):
        for c in range(groups):
            at = ((r // 128) * tiles + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            assert flat[at] == scale[r, c]
            padding[at] = 0
    assert not padding.any()
    assert flat.numel() == -(-count // 128) * 128 * tiles * 4
    assert torch.equal(quant.unswizzle(quant.swizzle(scale), count, groups), scale)


@pytest.mark.parametrize("kind", ["fp8_per_group", "mxfp8", "nvfp4"])
def test_layouts_hold_the_same_scales(kind):
    x = rows(130, 384)
    decoded = [made(name).decode(*made(name).encode(x)) for name in FORMATS if made(name).kind == kind]
    assert len(decoded) > 1
    assert all(torch.equal(other, decoded[0]) for other in decoded[1:])


# Names and errors


@formats
def test_a_format_goes_by_its_name(name):
    fmt = made(name)
    assert fmt.name == name
    assert repr(fmt) == f"quant.{name}"
    assert fmt.given is (GIVEN if fmt.given is not None else None)


@pytest.mark.parametrize(("fmt", "width", "needed"), [
    (FP8PerGroup(), 192, 128), (MXFP8(), 48, 32), (NVFP4(GIVEN), 24, 16),
])  # fmt: skip
def test_a_width_that_is_no_whole_number_of_groups_is_refused(fmt, width, needed):
    with pytest.raises(InvalidArgument, match=f"x is {width} wide; needed: a multiple of {needed}"):
        fmt.encode(torch.ones(2, width))


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1).double(), torch.ones(1, device="meta")], ids=str)
@pytest.mark.parametrize("make", [FP8Static, NVFP4])
def test_a_given_scale_is_one_float_where_the_rows_are(make, scale):
    with pytest.raises(InvalidArgument, match="needed: one float32 on cpu"):
        make(scale).encode(torch.ones(2, 128))


@pytest.mark.parametrize("make", [FP8Static, NVFP4])
def test_a_given_scale_that_is_no_tensor_is_refused(make):
    with pytest.raises(InvalidArgument, match="needs its scale, a tensor of one float32; given: float"):
        make(1.0)


def test_the_floor_of_groups_is_what_torch_computes_in_fp32():
    e4m3_max = torch.tensor(448.0, dtype=torch.float32)
    for eps in (1e-10, 1e-12, 3e-5):
        assert quant.group_floor(eps) == float(torch.tensor(eps, dtype=torch.float32) / e4m3_max)


def test_no_default_of_torch_changes_numbers(monkeypatch):
    spec = spec_from_file_location("quant_again", quant.__file__)
    again = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)  # where dataclasses look for annotations
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            spec.loader.exec_module(again)
        widened = NVFP4(GIVEN)._widen(torch.zeros(1, 8, dtype=torch.uint8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (again.GROUP_FLOOR, again.TOKEN_FLOOR) == (quant.GROUP_FLOOR, quant.TOKEN_FLOOR)
    assert widened.dtype == torch.float32


@pytest.mark.parametrize(("count", "pitch"), [(0, 0), (1, 4), (2, 4), (4, 4), (5, 8)])
def test_columns_that_are_aligned_start_at_multiples_of_four_floats(count, pitch):
    fmt = FP8PerGroup(column_major=True, tma_aligned=True)
    assert fmt.pitch(count, 256) == pitch
    if count > 1:
        assert fmt.encode(rows(count, 256))[1].stride() == (1, pitch)


def test_alignment_of_columns_needs_columns():
    with pytest.raises(InvalidArgument, match="needed with it: column_major=True"):
        FP8PerGroup(tma_aligned=True)


def test_a_scale_that_must_be_given_must_be_given():
    with pytest.raises(InvalidArgument, match="needs its scale"):
        FORMATS["nvfp4"](None)


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_of_another_shape_is_refused(name):
    fmt = FORMATS[name](torch.ones(1))
    got, scale = fmt.encode(torch.randn(4, 128))
    with pytest.raises(InvalidArgument, match="needed: the two that encode"):
        fmt.decode(got, torch.cat((scale.flatten(), scale.flatten())))
    if name == "fp8_per_token":
        with pytest.raises(InvalidArgument, match=r"quant \[4, 128\] and scale \[4\]; needed: the two that encode"):
            fmt.decode(got, scale.squeeze(-1))
