// RMS norm per group of columns: out = weight * v * rstd, rstd = 1 / sqrt(mean(v^2) + eps).
//
//   v = x, or v = x * silu(z) with the condition `gated` (the gate comes first, the norm second)
//   x, z, out [tokens, ngroups, n] · weight [ngroups, n] · rstd [tokens, ngroups]; a plain norm has one group
//   Elements are V: vec4f where n is a multiple of 4 (condition `vec4`). Sums in f32.
//
// rms_norm_rows: one invocation owns the same group of four neighbouring tokens, so that a weight is loaded
// once for four; nothing is shared between invocations. rms_norm_row: one workgroup owns one group of one
// token.
import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;
import package::lib::activations::{silu, silu4};

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> x: array<V>;
@if(gated) @group(0) @binding(1) var<storage, read> z: array<V>;
@group(0) @binding(2) var<storage, read> weight: array<V>;
@group(0) @binding(3) var<storage, read_write> out: array<V>;
@group(0) @binding(4) var<storage, read_write> rstd: array<f32>;

struct Params {
  tokens: u32,
  ngroups: u32,
  cols: u32, // n, in V
  n: u32,
  eps: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn value(i: u32) -> V {
  @if(gated && vec4) return x[i] * silu4(z[i]);
  @elif(gated) return x[i] * silu(z[i]);
  @else return x[i];
}

fn square(v: V) -> f32 {
  @if(vec4) return dot(v, v);
  @else return v * v;
}

@compute @workgroup_size(WG)
fn rms_norm_rows(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let g = i % params.ngroups;
  let first = i / params.ngroups * 4u;
  if (first >= params.tokens) { return; }
  // Tokens past the end repeat the last one: the same values are written again.
  let t = min(first + vec4u(0u, 1u, 2u, 3u), vec4u(params.tokens - 1u));
  let row = t * params.ngroups + g;
  let at = row * params.cols;
  var sum = vec4f();
  for (var c = 0u; c < params.cols; c++) {
    sum += vec4f(square(value(at.x + c)), square(value(at.y + c)),
      square(value(at.z + c)), square(value(at.w + c)));
  }
  let r = inverseSqrt(sum / f32(params.n) + params.eps);
  for (var c = 0u; c < params.cols; c++) {
    let w = weight[g * params.cols + c];
    out[at.x + c] = value(at.x + c) * r.x * w;
    out[at.y + c] = value(at.y + c) * r.y * w;
    out[at.z + c] = value(at.z + c) * r.z * w;
    out[at.w + c] = value(at.w + c) * r.w * w;
  }
  rstd[row.x] = r.x;
  rstd[row.y] = r.y;
  rstd[row.z] = r.z;
  rstd[row.w] = r.w;
}

@compute @workgroup_size(WG)
fn rms_norm_row(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = workgroup_index(wid, nwg);
  if (row >= params.tokens * params.ngroups) { return; }
  let at = row * params.cols;
  let g = row % params.ngroups;
  var sum = 0.0;
  for (var c = lane; c < params.cols; c += WG) {
    sum += square(value(at + c));
  }
  let r = inverseSqrt(workgroup_sum(sum, lane) / f32(params.n) + params.eps);
  for (var c = lane; c < params.cols; c += WG) {
    out[at + c] = value(at + c) * r * weight[g * params.cols + c];
  }
  if (lane == 0u) {
    rstd[row] = r;
  }
}
