// Gradients of ssd_steps.wgsl, from the sums that ssd_walk_dx.wgsl (inputs) and ssd_walk_dC.wgsl (outputs)
// leave. With u_t = dy_t . (S_t C_t) and v_t = dt_t x_t . (L_t B_t), both without the pair (t,t), the
// gradient of the exponent dt_t A is
//   alpha_t = sum over i >= t in t's chunk of (u_i - v_i) + <S, dS> at the chunk's end,
// since what is u to a pair of tokens at its end is v at its beginning. What cancels must stay small: sums
// begin anew in each chunk, and at a token that keeps next to nothing, where alpha_t is next to nothing, as
// every pair across the token counts by what it keeps, but is multiplied by the large dt_t A. Then
//   ddt_raw_t = (x_t . (L_t B_t) + A alpha_t) sigmoid(dt_raw_t + dt_bias), 0 where dt was clamped;
//   dA_log = A sum dt_t alpha_t;  ddt_bias = sum ddt_raw_t;  dD = sum dy_t . x_t.
//
// ddt_raw [B,L,H]; the last three are left per chunk, [B*chunks,3,apart], for sum_rows.wgsl. One invocation
// walks one chunk of one head backwards.

import package::lib::index::workgroup_index;
import package::lib::activations::{sigmoid, softplus};

struct Params {
  seqlen: u32,
  nheads: u32,
  blocks: u32,
  chunks: u32,
  tiles: u32, // partial sums of one token and head
  total: u32, // batch * chunks * nheads
  lo: f32,
  hi: f32,
  apart: u32, // from one of the last three to the next
}

@group(0) @binding(0) var<storage, read> dt_raw: array<f32>;
@group(0) @binding(1) var<storage, read> A_log: array<f32>;
@group(0) @binding(2) var<storage, read> dt_bias: array<f32>;
@group(0) @binding(3) var<storage, read> inputs: array<vec4f>;
@group(0) @binding(4) var<storage, read> outputs: array<vec4f>;
@group(0) @binding(5) var<storage, read> steps: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> ddt_raw: array<f32>;
@group(0) @binding(7) var<storage, read_write> sums: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;
override CHUNK: u32 = 16; // blocks

const NOTHING: f32 = 1e-9;

fn input_sums(head: u32, t: u32) -> vec4f {
  var sum = vec4f();
  for (var k = 0u; k < params.tiles; k++) {
    sum += inputs[(head * 4u * params.blocks + t) * params.tiles + k];
  }
  return sum;
}

fn output_sums(head: u32, i: u32) -> vec4f {
  var sum = vec4f();
  for (var k = 0u; k < params.tiles; k++) {
    sum += outputs[(head * (params.blocks + params.chunks) + i) * params.tiles + k];
  }
  return sum;
}

@compute @workgroup_size(WG)
fn ssd_steps_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let h = id % params.nheads;
  let c = id / params.nheads % params.chunks;
  let b = id / (params.nheads * params.chunks);
  let head = b * params.nheads + h;
  let A = -exp(A_log[h]);
  let bias = dt_bias[h];
  let ends = output_sums(head, params.blocks + c);
  var alpha = ends.x + ends.y + ends.z + ends.w;
  var dA = 0.0;
  var dbias = 0.0;
  var dD = 0.0;
  var u = vec4f();
  var kept = vec4f();
  for (var t = min(4u * CHUNK * (c + 1u), params.seqlen); t > 4u * CHUNK * c; t--) {
    let k = (t - 1u) % 4u;
    if (k == 3u || t == params.seqlen) {
      u = output_sums(head, (t - 1u) / 4u);
      kept = steps[head * (1u + 2u * params.blocks) + 2u + (t - 1u) / 4u * 2u];
    }
    let sum = input_sums(head, t - 1u);
    alpha = select(alpha + u[k] - sum.y, 0.0, kept[k] < NOTHING);
    let at = (b * params.seqlen + t - 1u) * params.nheads + h;
    let v = dt_raw[at] + bias;
    let free = softplus(v);
    dA += clamp(free, params.lo, params.hi) * alpha;
    let slope = select(sigmoid(v), 0.0, free < params.lo || free > params.hi);
    let d = (sum.x + A * alpha) * slope;
    ddt_raw[at] = d;
    dbias += d;
    dD += sum.z;
  }
  let row = (b * params.chunks + c) * 3u * params.apart + h;
  sums[row] = A * dA;
  sums[row + params.apart] = dbias;
  sums[row + 2u * params.apart] = dD;
}
