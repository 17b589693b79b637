// Philox4x32-10: random bits as a function of a counter; the same bits as src/tensor/philox.ts.
//
// `key` = (seed low, seed high, step, stream). Element e of a sequence is word e % 4 of the block whose
// counter is (floor(e / 4), 0, step, stream), under the key (seed low, seed high).
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

// High 32 bits of a * b, from 16-bit halves for want of a 64-bit product; no partial sum overflows.
fn multiply_high(a: u32, b: u32) -> u32 {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
  let lower = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
  return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (lower >> 16u);
}

fn philox4x32(counter: vec4u, seed: vec2u) -> vec4u {
  var c = counter;
  var k = seed;
  for (var round = 0u; round < 10u; round++) {
    let high0 = multiply_high(0xd2511f53u, c.x);
    let high1 = multiply_high(0xcd9e8d57u, c.z);
    c = vec4u(high1 ^ c.y ^ k.x, 0xcd9e8d57u * c.z, high0 ^ c.w ^ k.y, 0xd2511f53u * c.x);
    k += vec2u(0x9e3779b9u, 0xbb67ae85u);
  }
  return c;
}

// Uniform in [0, 1) with 24 bits: exact in f32.
fn random_uniform(key: vec4u, element: u32) -> f32 {
  let words = philox4x32(vec4u(element / 4u, 0u, key.z, key.w), key.xy);
  return f32(words[element % 4u] >> 8u) * 0x1p-24;
}
