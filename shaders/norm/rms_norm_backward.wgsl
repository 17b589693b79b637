// RMS norm, backward to its input. With vhat = v * rstd and g = dout * weight:
//
//   dv = rstd * (g - vhat * mean(g * vhat)), the mean over the n columns of a group
//   dx = dv, or with the condition `gated` (v = x * silu(z)): dx = dv * silu(z), dz = dv * x * silu'(z),
//   or with the condition `added`: dx = dv + z
//
// Shapes, elements and the two ways of sharing the work are those of rms_norm.wgsl. Sums in f32. The way by
// rows also leaves the sum of dout * vhat over its four tokens in `partial` [ceil(tokens / 4), ngroups, n],
// from which weight_gradient.wgsl makes the gradient of the weight: all that it needs is at hand here.
// Source: state-spaces/mamba, layernorm_gated with norm_before_gate = false.
import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;
import package::lib::activations::{sigmoid, sigmoid4};

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> x: array<V>;
@if(gated || added) @group(0) @binding(1) var<storage, read> z: array<V>; // the gate, or what is added
@group(0) @binding(2) var<storage, read> weight: array<V>;
@group(0) @binding(3) var<storage, read> rstd: array<f32>;
@group(0) @binding(4) var<storage, read> dout: array<V>;
@group(0) @binding(5) var<storage, read_write> dx: array<V>;
@if(gated) @group(0) @binding(6) var<storage, read_write> dz: array<V>;
@group(0) @binding(7) var<storage, read_write> partial: array<V>;

struct Params {
  tokens: u32,
  ngroups: u32,
  cols: u32, // n, in V
  n: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(gated)
fn gate_of(v: V) -> V {
  @if(vec4) return sigmoid4(v);
  @else return sigmoid(v);
}

fn value(i: u32) -> V {
  @if(gated) {
    let gate = z[i];
    return x[i] * gate * gate_of(gate);
  }
  @else return x[i];
}

fn product(a: V, b: V) -> f32 {
  @if(vec4) return dot(a, b);
  @else return a * b;
}

// Writes the gradients of element i and returns dout * vhat. `mean` is that of g * vhat, `w` the weight.
fn store(i: u32, r: f32, mean: f32, w: V) -> V {
  let incoming = dout[i];
  let input = x[i];
  @if(gated) {
    let gate = z[i];
    let s = gate_of(gate);
    let vhat = r * input * gate * s;
    let dv = r * (incoming * w - vhat * mean);
    dx[i] = dv * gate * s;
    dz[i] = dv * input * s * (1.0 + gate * (1.0 - s));
    return incoming * vhat;
  }
  @else {
    let vhat = r * input;
    @if(added) dx[i] = r * (incoming * w - vhat * mean) + z[i];
    @else dx[i] = r * (incoming * w - vhat * mean);
    return incoming * vhat;
  }
}

@compute @workgroup_size(WG)
fn rms_norm_backward_rows(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let g = i % params.ngroups;
  let first = i / params.ngroups * 4u;
  if (first >= params.tokens) { return; }
  // Tokens past the end repeat the last one: the same values are written again, but summed only once.
  let wanted = first + vec4u(0u, 1u, 2u, 3u);
  let live = select(vec4f(), vec4f(1.0), vec4u(params.tokens) > wanted);
  let t = min(wanted, vec4u(params.tokens - 1u));
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
    var sum = store(at.x + c, r.x, mean.x, w);
    sum += live.y * store(at.y + c, r.y, mean.y, w);
    sum += live.z * store(at.z + c, r.z, mean.z, w);
    sum += live.w * store(at.w + c, r.w, mean.w, w);
    partial[i * params.cols + c] = sum; // i is part * ngroups + g
  }
}

@compute @workgroup_size(WG)
fn rms_norm_backward_row(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
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
