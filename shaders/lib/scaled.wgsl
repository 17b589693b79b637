// Scales of blocks, bit for bit like `quantizeScaled` of src/tensor/formats.ts. Magnitudes are f32 bits
// without sign; the largest of a block, taken as u32, is NaN where one of its values is.

import package::lib::formats::{E4M3, Format, power_code, element_code, element_value, scaled_code};
import package::lib::exact::{INFINITY, exact_quotient, exact_product};

const SIX: u32 = 0x40c00000u;
const NVFP4_RANGE: u32 = 0x45280000u;         // 448 * 6

// The shared power of two of an MX block as an E8M0 code: floor(log2 amax) - emax, or with `ceil` the least
// for which nothing saturates. `limit` is the largest element's significand.
fn mx_scale(amax: u32, emax: i32, limit: u32, ceil: bool) -> u32 {
  return power_code(amax, emax, select(0xffffffffu, limit, ceil));
}

// The element of x in an MX block with this scale code.
fn mx_code(x: u32, scale: u32, f: Format) -> u32 {
  return select(scaled_code(x, 127 - i32(scale), f), f.nan, scale == 255u);
}

// The tensor's scale: amax / 2688.
fn nvfp4_global(amax: u32) -> u32 {
  return exact_quotient(amax, NVFP4_RANGE);
}

// The E4M3 code of a block's scale: (amax / top) / g, each step rounded. `top`, six as a rule, is what amax
// is mapped to.
fn nvfp4_scale(amax: u32, top: u32, global: u32) -> u32 {
  if (global == 0u) { return 0u; }
  return element_code(exact_quotient(exact_quotient(amax, top), global), E4M3);
}

// What the block's values are divided by; infinity where that would be zero, so that they become zeros. The
// element is quotient_code(x, divisor, E2M1) of lib/exact.wgsl.
fn nvfp4_divisor(scale: u32, global: u32) -> u32 {
  let product = exact_product(element_value(scale, E4M3), global);
  return select(product, INFINITY, product == 0u);
}

// The same with reciprocals, in the order of Transformer Engine: S = min(2688 / amax, FLT_MAX), 1 where amax
// or S is zero; scale = E4M3(min(amax_block * (S * f32(1 / 6)), FLT_MAX)); elements are multiplied with
// min(1 / (scale * f32(1 / S)), FLT_MAX).
const FLT_MAX: u32 = 0x7f7fffffu;

fn nvfp4_encoding(amax: u32) -> u32 {
  let s = min(exact_quotient(NVFP4_RANGE, amax), FLT_MAX);
  return select(s, 0x3f800000u, amax == 0u || s == 0u);
}

fn reciprocal_scale(amax: u32, encoding: u32) -> u32 {
  return element_code(min(exact_product(amax, exact_product(encoding, 0x3e2aaaabu)), FLT_MAX), E4M3);
}

fn reciprocal_factor(scale: u32, decoding: u32) -> u32 {
  return min(exact_quotient(0x3f800000u, exact_product(element_value(scale, E4M3), decoding)), FLT_MAX);
}

fn product_code(x: u32, factor: u32, f: Format) -> u32 {
  return element_code((x & 0x80000000u) | exact_product(x & 0x7fffffffu, factor), f);
}

// The scale of values that share one in f32: amax / most, 1 where that is 0. `most` is 448 or 57344 in f32.
fn tensor_scale(amax: u32, most: u32) -> u32 {
  let scale = exact_quotient(amax, most);
  return select(scale, 0x3f800000u, scale == 0u);
}

// The power by which the values of a 128 block are multiplied: of 448 / amax without its fraction.
fn blockwise_power(amax: u32) -> i32 {
  if (amax == 0u || amax >= INFINITY) { return 0; }
  return i32(min(exact_quotient(0x43e00000u, amax), 0x7e800000u) >> 23u) - 127;
}
