// Random numbers that belong to a token and a feature, wherever the token lies: the same on every rank.
//
//   jitter:        y = x * (1 + amount * (2 u - 1)), u uniform in [0, 1)
//   random_logits: y = sqrt(3) * (sum of four u - 2), of mean 0 and variance 1 and nearly normal
//
//   x, y [T, D]; rows u32 [T]: number of each token in the whole batch, with the condition `numbered`
//
// A block of Philox words has the counter (feature block, token, step, stream): jitter takes one word per
// feature, random_logits all four of a block. One invocation takes four features of a token.
import package::lib::index::workgroup_index;
import package::lib::philox::philox4x32;

override WG: u32 = 64;

struct Params {
  tokens: u32,
  features: u32,
  parts: u32, // of four features
  stream: u32,
  amount: f32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> counter: array<u32>; // seed low, seed high, step
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

fn uniforms(part: u32, token: u32) -> vec4f {
  @if(numbered) let number = rows[token];
  @else let number = token;
  let words = philox4x32(vec4u(part, number, counter[2], params.stream), vec2u(counter[0], counter[1]));
  return vec4f(words >> vec4u(8u)) * 0x1p-24;
}

@compute @workgroup_size(WG)
fn jitter(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let token = i / params.parts;
  if (token >= params.tokens) {
    return;
  }
  let part = i % params.parts;
  let u = uniforms(part, token);
  let first = token * params.features;
  for (var j = 0u; j < min(4u, params.features - 4u * part); j++) {
    let at = first + 4u * part + j;
    y[at] = x[at] * (1.0 + params.amount * (2.0 * u[j] - 1.0));
  }
}

@compute @workgroup_size(WG)
fn random_logits(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let token = i / params.parts;
  if (token >= params.tokens) {
    return;
  }
  let part = i % params.parts;
  for (var j = 0u; j < min(4u, params.features - 4u * part); j++) {
    let feature = 4u * part + j;
    let u = uniforms(feature, token);
    y[token * params.features + feature] = 1.7320508 * (u.x + u.y + u.z + u.w - 2.0);
  }
}
