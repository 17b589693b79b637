// f32 products and quotients rounded to nearest, ties to even, on bits: WGSL allows a quotient 2.5 units in
// the last place of error, leaves the direction of rounding open and may flush subnormal numbers.
//
// Magnitudes are bit patterns without sign. Infinity and NaN as in IEEE 754.

import package::lib::formats::{Format, parts_of, element_code, random_code};

const INFINITY: u32 = 0x7f800000u;
const NAN: u32 = 0x7fc00000u;

// The f32 with this exponent field and significand of 24 bits, followed by `extra` bits to be rounded away.
fn rounded(significand: u32, extra: u32, exponent: i32) -> u32 {
  let lost = extra + u32(max(1 - exponent, 0));
  if (lost > extra + 24u) { return 0u; }
  let half = 1u << (lost - 1u);
  let kept = (significand + half - 1u + ((significand >> lost) & 1u)) >> lost;
  return min((u32(max(exponent - 1, 0)) << 23u) + kept, INFINITY);
}

// x / y of magnitudes.
fn exact_quotient(x: u32, y: u32) -> u32 {
  if (x > INFINITY || y > INFINITY || (x == y && (x == 0u || x == INFINITY))) { return NAN; }
  if (y == 0u || x == INFINITY) { return INFINITY; }
  if (x == 0u || y == INFINITY) { return 0u; }
  let a = parts_of(x);
  let b = parts_of(y);
  // Long division in digits of eight bits: a remainder is below the divisor's 24 bits.
  let shift = u32(a.significand < b.significand);
  var rest = (a.significand << shift) - b.significand;
  var quotient = 1u;
  for (var digit = 0u; digit < 3u; digit++) {
    rest <<= 8u;
    let next = rest / b.significand;
    rest -= next * b.significand;
    quotient = (quotient << 8u) | next;
  }
  // 25 bits, and one that says whether more follow.
  let significand = (quotient << 1u) | u32(rest != 0u);
  return rounded(significand, 2u, a.exponent - b.exponent + 127 - i32(shift));
}

// x * y of magnitudes.
fn exact_product(x: u32, y: u32) -> u32 {
  if (x > INFINITY || y > INFINITY || (min(x, y) == 0u && max(x, y) == INFINITY)) { return NAN; }
  if (max(x, y) == INFINITY) { return INFINITY; }
  if (min(x, y) == 0u) { return 0u; }
  let a = parts_of(x);
  let b = parts_of(y);
  // 48 bits from halves of 12: 23 or 24 of them in `high`, 24 in `tail`.
  let low = (a.significand & 0xfffu) * (b.significand & 0xfffu);
  let middle = (a.significand >> 12u) * (b.significand & 0xfffu) +
    (a.significand & 0xfffu) * (b.significand >> 12u) + (low >> 12u);
  let high = (a.significand >> 12u) * (b.significand >> 12u) + (middle >> 12u);
  let tail = ((middle & 0xfffu) << 12u) | (low & 0xfffu);
  let carry = u32(high >= 0x800000u);
  let bits = (high << (3u - carry)) | (tail >> (21u + carry)); // 26 bits
  let more = (tail & ((1u << (21u + carry)) - 1u)) != 0u;
  return rounded((bits << 1u) | u32(more), 3u, a.exponent + b.exponent - 127 + i32(carry));
}

// The code nearest to f32(x / y), for a magnitude y. The adapter's own quotient decides where a few units in
// its last place change nothing, long division elsewhere.
fn quotient_code(x: u32, y: u32, f: Format) -> u32 {
  let sign = x & 0x80000000u;
  let guess = quotient_guess(x & 0x7fffffffu, y);
  let code = element_code(sign | (max(guess, 8u) - 8u), f);
  if (trusted(guess, y) && code == element_code(sign | (guess + 8u), f)) { return code; }
  return element_code(sign | exact_quotient(x & 0x7fffffffu, y), f);
}

// The same for a code chosen at random.
fn random_quotient_code(x: u32, y: u32, random: u32, f: Format) -> u32 {
  let sign = x & 0x80000000u;
  let guess = quotient_guess(x & 0x7fffffffu, y);
  let code = random_code(sign | (max(guess, 8u) - 8u), random, f);
  if (trusted(guess, y) && code == random_code(sign | (guess + 8u), random, f)) { return code; }
  return random_code(sign | exact_quotient(x & 0x7fffffffu, y), random, f);
}

fn quotient_guess(x: u32, y: u32) -> u32 {
  return bitcast<u32>(bitcast<f32>(x) / bitcast<f32>(y));
}

// Divisors from 2^-100 to 2^100, quotients below 2^100: there a division is off by a few units at most, and
// a dividend taken for zero gives a code of zero all the same.
fn trusted(quotient: u32, y: u32) -> bool {
  return y >= 0x0d800000u && y <= 0x71800000u && quotient < 0x71800000u;
}
