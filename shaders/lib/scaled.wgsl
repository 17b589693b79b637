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

// The E4M3 code of a block's scale: (amax / 6) / g, each step rounded.
fn nvfp4_scale(amax: u32, global: u32) -> u32 {
  if (global == 0u) { return 0u; }
  return element_code(exact_quotient(exact_quotient(amax, SIX), global), E4M3);
}

// What the block's values are divided by; infinity where that would be zero, so that they become zeros. The
// element is quotient_code(x, divisor, E2M1) of lib/exact.wgsl.
fn nvfp4_divisor(scale: u32, global: u32) -> u32 {
  let product = exact_product(element_value(scale, E4M3), global);
  return select(product, INFINITY, product == 0u);
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
