// Softmax over rows: y = exp(x - top) / sum(exp(x - top)), top the largest entry of the row; and backward to
// its input: dx = y * (dy - sum(dy * y)).
//
//   x, y, dy, dx [rows, n] in elements of V: vec4f where n is a multiple of 4 (condition `vec4`). Sums in
//   f32.
//
// One workgroup owns one row. Maximum and sum are found in one pass: whenever a block of four elements raises
// an invocation's maximum, its sum so far is scaled down. exp is taken of values <= 0 only.
import package::lib::index::workgroup_index;
import package::lib::reduce::{workgroup_sum, workgroup_max};

@if(vec4) alias V = vec4f;
@else alias V = f32;

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read_write> y: array<V>;
@group(0) @binding(2) var<storage, read> weight: array<V>; // backward: y
@group(0) @binding(3) var<storage, read> dy: array<V>;
@group(0) @binding(4) var<storage, read_write> dx: array<V>;

struct Params {
  rows: u32,
  cols: u32, // n, in V
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

const LOWEST: f32 = -3.4028234e38;

fn largest(v: V) -> f32 {
  @if(vec4) return max(max(v.x, v.y), max(v.z, v.w));
  @else return v;
}

fn total(v: V) -> f32 {
  @if(vec4) return dot(v, vec4f(1.0));
  @else return v;
}

@compute @workgroup_size(WG)
fn softmax(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = workgroup_index(wid, nwg);
  if (row >= params.rows) { return; }
  let at = row * params.cols;
  let end = at + params.cols;
  let blocks = params.cols / (4u * WG);
  let rest = at + blocks * 4u * WG + lane;
  var top = LOWEST;
  var sum = V();
  for (var b = 0u; b < blocks; b++) {
    let i = at + b * 4u * WG + lane;
    let x0 = x[i];
    let x1 = x[i + WG];
    let x2 = x[i + 2u * WG];
    let x3 = x[i + 3u * WG];
    let higher = max(top, largest(max(max(x0, x1), max(x2, x3))));
    if (higher > top) {
      sum *= exp(top - higher);
      top = higher;
    }
    sum += exp(x0 - top) + exp(x1 - top) + exp(x2 - top) + exp(x3 - top);
  }
  for (var i = rest; i < end; i += WG) {
    let x0 = x[i];
    let higher = max(top, largest(x0));
    sum = sum * exp(top - higher) + exp(x0 - higher);
    top = higher;
  }
  let highest = workgroup_max(top, lane);
  let scale = 1.0 / workgroup_sum(total(sum) * exp(top - highest), lane);
  for (var b = 0u; b < blocks; b++) {
    let i = at + b * 4u * WG + lane;
    y[i] = exp(x[i] - highest) * scale;
    y[i + WG] = exp(x[i + WG] - highest) * scale;
    y[i + 2u * WG] = exp(x[i + 2u * WG] - highest) * scale;
    y[i + 3u * WG] = exp(x[i + 3u * WG] - highest) * scale;
  }
  for (var i = rest; i < end; i += WG) {
    y[i] = exp(x[i] - highest) * scale;
  }
}

@compute @workgroup_size(WG)
fn softmax_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = workgroup_index(wid, nwg);
  if (row >= params.rows) { return; }
  let at = row * params.cols;
  let end = at + params.cols;
  var sum = V();
  for (var i = at + lane; i < end; i += WG) {
    sum += dy[i] * weight[i];
  }
  let mean = workgroup_sum(total(sum), lane);
  for (var i = at + lane; i < end; i += WG) {
    dx[i] = weight[i] * (dy[i] - mean);
  }
}
