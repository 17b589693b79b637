// Unsigned integers in the order of the floats they come from, so that thresholds can be searched digit by
// digit.
// -0 and +0 have one key; infinities are ordered too. No number has the key 0, which callers use for "left
// out".

fn order_key(x: f32) -> u32 {
  let bits = select(bitcast<u32>(x), 0u, x == 0.0);
  return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

// The float of a key.
fn order_value(key: u32) -> f32 {
  return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}
