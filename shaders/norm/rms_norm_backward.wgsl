// RMS norm, backward to its input. With vhat = v * rstd and g = dout * weight:
//
//   dv = rstd * (g - vhat * mean(g * vhat)), the mean over the n columns of a group
//   dx = dv, or with the condition `gated` (v = x * silu(z)): dx = dv * silu(z), dz = dv * x * silu'(z)
//
// Shapes, elements and the two ways of sharing the work are those of rms_norm.wgsl. Sums in f32.
// Source: spec of the gated norm in state-spaces/mamba (layernorm_gated, norm_before_gate = false).
import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;
import package::lib::activations::{silu, silu4, silu_grad, silu_grad4};

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> x: array<V>;
@if(gated) @group(0) @binding(1) var<storage, read> z: array<V>;
@group(0) @binding(2) var<storage, read> weight: array<V>;
@group(0) @binding(3) var<storage, read> rstd: array<f32>;
@group(0) @binding(4) var<storage, read> dout: array<V>;
@group(0) @binding(5) var<storage, read_write> dx: array<V>;
@if(gated) @group(0) @binding(6) var<storage, read_write> dz: array<V>;

struct Params {
  tokens: u32,
  ngroups: u32,
  cols: u32, // n, in V
  n: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn value(i: u32) -> V {
  @if(gated && vec4) return x[i] * silu4(z[i]);
  @elif(gated) return x[i] * silu(z[i]);
  @else return x[i];
}

fn product(a: V, b: V) -> f32 {
  @if(vec4) return dot(a, b);
  @else return a * b;
}

// Writes the gradients of element i. `mean` is that of g * vhat, `w` the weight.
fn store(i: u32, r: f32, mean: f32, w: V) {
  @if(gated && vec4) {
    let gate = silu4(z[i]);
    let dv = r * (dout[i] * w - x[i] * gate * r * mean);
    dx[i] = dv * gate;
    dz[i] = dv * x[i] * silu_grad4(z[i]);
  }
  @elif(gated) {
    let gate = silu(z[i]);
    let dv = r * (dout[i] * w - x[i] * gate * r * mean);
    dx[i] = dv * gate;
    dz[i] = dv * x[i] * silu_grad(z[i]);
  }
  @else {
    dx[i] = r * (dout[i] * w - x[i] * r * mean);
  }
}

@compute @workgroup_size(WG)
fn rms_norm_backward_rows(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
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
    let w = weight[g * params.cols + c];
    sum += vec4f(product(dout[at.x + c] * w, value(at.x + c)), product(dout[at.y + c] * w, value(at.y + c)),
      product(dout[at.z + c] * w, value(at.z + c)), product(dout[at.w + c] * w, value(at.w + c)));
  }
  let r = vec4f(rstd[row.x], rstd[row.y], rstd[row.z], rstd[row.w]);
  let mean = sum * r / f32(params.n);
  for (var c = 0u; c < params.cols; c++) {
    let w = weight[g * params.cols + c];
    store(at.x + c, r.x, mean.x, w);
    store(at.y + c, r.y, mean.y, w);
    store(at.z + c, r.z, mean.z, w);
    store(at.w + c, r.w, mean.w, w);
  }
}

@compute @workgroup_size(WG)
fn rms_norm_backward_row(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  let row = workgroup_index(wid, nwg);
  if (row >= params.tokens * params.ngroups) { return; }
  let at = row * params.cols;
  let g = row % params.ngroups;
  var sum = 0.0;
  for (var c = lane; c < params.cols; c += WG) {
    sum += product(dout[at + c] * weight[g * params.cols + c], value(at + c));
  }
  let r = rstd[row];
  let mean = workgroup_sum(sum, lane) * r / f32(params.n);
  for (var c = lane; c < params.cols; c += WG) {
    store(at + c, r, mean, weight[g * params.cols + c]);
  }
}
