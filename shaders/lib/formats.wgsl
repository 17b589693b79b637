// Elements of low precision, bit for bit like src/tensor/formats.ts. Values are passed as the bits of f32,
// so that subnormal numbers and NaN survive: WGSL leaves both open, and the direction of rounding too.
//
//   element_code(bits, E4M3)          the nearest code, ties to even
//   random_code(bits, random, E4M3)   one of the two codes around x: the farther from zero when the fraction
//                                     of the step past the nearer plus random / 2^n reaches 1
//   scaled_code(bits, power, E4M3)    the nearest code of x * 2^power, which is rounded once
//   element_value(code, E4M3)         the bits of the f32 value
//   power_above(bits), power_below    E8M0 codes; power_value(code) decodes them
//
// Codes saturate: what lies beyond the largest value, infinity too, becomes that value with its sign. NaN
// becomes `nan`, which for E2M1 is its largest value.

struct Format {
  man: u32, bias: i32,                        // fraction bits, exponent bias
  width: u32,                                 // bits of a code
  most: u32, infinity: u32, nan: u32,         // codes: the largest finite, infinity where there is one, NaN
  random: u32,                                // random bits of one rounding
}

const NONE: u32 = 0xffffffffu;
const E4M3 = Format(3u, 7, 8u, 0x7eu, NONE, 0x7fu, 8u);
const E5M2 = Format(2u, 15, 8u, 0x7bu, 0x7cu, 0x7fu, 8u);
const E2M1 = Format(1u, 1, 4u, 7u, NONE, 7u, 8u);
const BF16 = Format(7u, 127, 16u, 0x7f7fu, 0x7f80u, 0x7fc0u, 16u);
const F16 = Format(10u, 15, 16u, 0x7bffu, 0x7c00u, 0x7e00u, 16u);

// |x| = significand * 2^(exponent - 150); 24 bits of significand for subnormal numbers too, 0 for zero.
struct Parts { significand: u32, exponent: i32 }

fn parts_of(bits: u32) -> Parts {
  let field = (bits >> 23u) & 0xffu;
  let fraction = bits & 0x7fffffu;
  if (field != 0u) { return Parts(fraction | 0x800000u, i32(field)); }
  let shift = countLeadingZeros(fraction) - 8u;
  return Parts(fraction << shift, 1 - i32(shift));
}

// Bits of the significand below the last place of the format at this exponent.
fn lost_bits(exponent: i32, f: Format) -> u32 {
  return 23u - f.man + u32(max(128 - f.bias - exponent, 0));
}

// `kept` holds the significand's upper bits. A carry out of them reaches the exponent by itself: codes of one
// sign are in order of value.
fn signed_code(bits: u32, exponent: i32, kept: u32, f: Format) -> u32 {
  let magnitude = (u32(max(exponent + f.bias - 128, 0)) << f.man) + kept;
  let sign = (bits >> 31u) << (f.width - 1u);
  return select(sign | min(magnitude, f.most), f.nan, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn scaled_code(bits: u32, power: i32, f: Format) -> u32 {
  let p = parts_of(bits);
  let lost = lost_bits(p.exponent + power, f);
  if (lost > 24u) { return signed_code(bits, 0, 0u, f); }
  let half = 1u << (lost - 1u);
  let kept = (p.significand + half - 1u + ((p.significand >> lost) & 1u)) >> lost;
  return signed_code(bits, p.exponent + power, kept, f);
}

fn element_code(bits: u32, f: Format) -> u32 {
  return scaled_code(bits, 0, f);
}

fn scaled_random_code(bits: u32, power: i32, random: u32, f: Format) -> u32 {
  let p = parts_of(bits);
  let lost = lost_bits(p.exponent + power, f);
  if (lost > 31u) { return signed_code(bits, 0, 0u, f); }
  let part = random & ((1u << f.random) - 1u);
  let added = select(part >> (f.random - min(lost, f.random)), part << (max(lost, f.random) - f.random),
    lost >= f.random);
  return signed_code(bits, p.exponent + power, (p.significand + added) >> lost, f);
}

fn random_code(bits: u32, random: u32, f: Format) -> u32 {
  return scaled_random_code(bits, 0, random, f);
}

fn element_value(code: u32, f: Format) -> u32 {
  let sign = ((code >> (f.width - 1u)) & 1u) << 31u;
  let magnitude = code & ((1u << (f.width - 1u)) - 1u);
  if (magnitude > f.most) { return sign | select(0x7fc00000u, 0x7f800000u, magnitude == f.infinity); }
  // With a zero exponent field the value is `magnitude` units; the leading one becomes implicit.
  let top = 31u - countLeadingZeros(magnitude | 1u);
  let fraction = (magnitude << (23u - top)) & 0x7fffffu;
  let unit = 128 - f.bias - i32(f.man) + i32(top); // exponent field of the result
  let small = select((u32(max(unit, 0)) << 23u) | fraction, 0u, magnitude == 0u);
  let normal = (magnitude << (23u - f.man)) + (u32(127 - f.bias) << 23u);
  // Only bf16 has values that are subnormal in f32 too, with the same bits.
  return sign | select(normal, small, magnitude < (1u << f.man) && f.bias != 127);
}

// The E8M0 code of the power of two next to |x| * 2^-emax: not above it, or the next one where the
// significand exceeds `limit`. Held within 0 .. 254; zero gives 0, infinity 254, NaN 255.
fn power_code(bits: u32, emax: i32, limit: u32) -> u32 {
  let magnitude = bits & 0x7fffffffu;
  let p = parts_of(bits);
  let code = u32(clamp(p.exponent - emax + select(0, 1, p.significand > limit), 0, 254));
  let special = select(254u, 255u, magnitude > 0x7f800000u);
  return select(select(code, special, magnitude >= 0x7f800000u), 0u, magnitude == 0u);
}

fn power_below(bits: u32) -> u32 {
  return power_code(bits, 0, NONE);
}

fn power_above(bits: u32) -> u32 {
  return power_code(bits, 0, 0x800000u);
}

fn power_value(code: u32) -> u32 {
  return select(select(code << 23u, 0x400000u, code == 0u), 0x7fc00000u, code == 255u);
}
