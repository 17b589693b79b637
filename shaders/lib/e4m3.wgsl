// Four E4M3 codes of a word, the first in its low byte, as f32. Exact for all codes but NaN, which reads as
// +-480: codes that a cache or a weight holds are finite. No subnormal f32 arises on the way, which an
// adapter might flush: code m < 8 comes out as 2^-7 (1 + m / 8), from which m 2^-9 follows.
fn four_e4m3(word: u32) -> vec4f {
  let codes = vec4u(word, word >> 8u, word >> 16u, word >> 24u);
  let magnitude = codes & vec4u(0x7fu);
  let x = bitcast<vec4f>((magnitude << vec4u(20u)) + vec4u(0x3c000000u));
  let value = select(x, 2.0 * (x - 0x1p-7), magnitude < vec4u(8u));
  return bitcast<vec4f>(bitcast<vec4u>(value) | ((codes & vec4u(0x80u)) << vec4u(24u)));
}
