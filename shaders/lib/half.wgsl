// f16 and bf16 in storage: two elements in one u32, the first in the low half.
//
// Decoding is exact. Encoding rounds to nearest, ties to even, on the bits: WGSL leaves the rounding of
// pack2x16float open.

fn f16_pair(bits: u32) -> vec2f {
  return unpack2x16float(bits);
}

fn bf16_pair(bits: u32) -> vec2f {
  return vec2f(bitcast<f32>(bits << 16u), bitcast<f32>(bits & 0xffff0000u));
}

fn f16_bits(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  let sign = (bits >> 16u) & 0x8000u;
  let magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return sign | 0x7e00u; }           // not a number
  if (magnitude >= 0x477ff000u) { return sign | 0x7c00u; }          // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the spacing is 2^-24: adding 0.5, whose last place is 2^-24, rounds to it.
    return sign | (bitcast<u32>(bitcast<f32>(magnitude) + 0.5) - 0x3f000000u);
  }
  return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u);
}

fn bf16_bits(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return 0x7fc0u; }
  return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn f16_pack(x: vec2f) -> u32 {
  return f16_bits(x.x) | (f16_bits(x.y) << 16u);
}

fn bf16_pack(x: vec2f) -> u32 {
  return bf16_bits(x.x) | (bf16_bits(x.y) << 16u);
}
