// y[m] = W x[m] (+ bias, then relu2, then + residual) in f32 for few rows m: decoding.
//
// x [M, K], W [N, K], y [M, N]. The time goes into reading W once per row of x. Two shapes of the same sum:
// matvec_quad: an invocation computes four outputs alone (CPU-emulated adapters: many loads and no exchange);
// matvec: 16 invocations share one output, neighbours read neighbours in memory, and a workgroup of 64
// computes four outputs; with `split` it adds up one of `parts` parts of k and stores the sum as it is in y
// [parts, M, N], for matvec_sum to add the parts in order.
//
// `grouped`: row m uses the matrix of the expert e with offsets[e] <= m < offsets[e + 1]. `vec4`: K is a
// multiple of 4. `w_f16`, `w_bf16`, for such a K: the format of W. Accumulation: f32, fixed order.

import package::lib::index::workgroup_index;
import package::lib::half::f16_pair;
import package::lib::half::bf16_pair;

@if(vec4 || w_f16 || w_bf16) alias V = vec4f;
@else alias V = f32;
@if(w_f16 || w_bf16) alias W = vec2u;
@else alias W = V;
@if(vec4 || w_f16 || w_bf16) const WIDTH: u32 = 4;
@else const WIDTH: u32 = 1;

struct Params {
  m: u32, n: u32, k: u32, experts: u32,
  parts: u32, steps: u32,                     // of a sum over k: their number, and the vectors of one
}

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read> weight: array<W>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> offsets: array<u32>;
@group(0) @binding(5) var<storage, read> residual: array<f32>;
@group(0) @binding(6) var<storage, read> sums: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 16;                        // of matvec_quad
const LANES: u32 = 16;                        // invocations per output of matvec

// Where the matrix of a row begins; `experts` for a row that no expert owns.
fn expert_of(row: u32) -> u32 {
  @if(!grouped) return 0u;
  @else {
    var e = 0u;
    while (e < params.experts && offsets[e + 1u] <= row) { e++; }
    return e;
  }
}

// One vector of x times one of W, added to a sum.
fn product(u: V, w: W, sum: f32) -> f32 {
  @if(w_bf16) let v = vec4f(bf16_pair(w.x), bf16_pair(w.y));
  @elif(w_f16) let v = vec4f(f16_pair(w.x), f16_pair(w.y));
  @else let v = w;
  @if(vec4 || w_f16 || w_bf16) return sum + dot(u, v);
  @else return fma(u, v, sum);
}

fn put(row: u32, column: u32, sum: f32) {
  if (row >= params.m || column >= params.n) { return; }
  var value = sum;
  @if(bias) value += bias[column];
  @if(relu2) value = max(value, 0.0) * max(value, 0.0);
  @if(residual) value += residual[row * params.n + column];
  y[row * params.n + column] = value;
}

@compute @workgroup_size(WG)
fn matvec_quad(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let quads = (params.n + 3u) / 4u;
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / quads;
  if (row >= params.m) { return; }
  let expert = expert_of(row);
  if (expert >= max(params.experts, 1u)) { return; }
  let steps = params.k / WIDTH;
  let column = i % quads * 4u;
  let w = (expert * params.n + min(column + vec4u(0u, 1u, 2u, 3u), vec4u(params.n - 1u))) * steps;
  var s = vec4f();
  for (var k = 0u; k < steps; k++) {
    let u = x[row * steps + k];
    s = vec4f(product(u, weight[w.x + k], s.x), product(u, weight[w.y + k], s.y),
      product(u, weight[w.z + k], s.z), product(u, weight[w.w + k], s.w));
  }
  put(row, column, s.x);
  put(row, column + 1u, s.y);
  put(row, column + 2u, s.z);
  put(row, column + 3u, s.w);
}

var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn matvec(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let quads = (params.n + 3u) / 4u;
  @if(!split) let group = workgroup_index(wid, nwg);
  @else let group = workgroup_index(wid, nwg) / params.parts;
  let row = group / quads;
  let column = group % quads * 4u + lane / LANES;
  @if(!split) let part = 0u;
  @else let part = workgroup_index(wid, nwg) % params.parts;
  var expert = params.experts;
  if (row < params.m) { expert = expert_of(row); }
  var s = 0.0;
  if (row < params.m && column < params.n && expert < max(params.experts, 1u)) {
    let steps = params.k / WIDTH;
    let w = (expert * params.n + column) * steps;
    let end = min(steps, (part + 1u) * params.steps);
    for (var k = part * params.steps + lane % LANES; k < end; k += LANES) {
      s = product(x[row * steps + k], weight[w + k], s);
    }
  }
  partial[lane] = s;
  workgroupBarrier();
  if (lane % LANES == 0u && expert < max(params.experts, 1u)) {
    var total = 0.0;
    for (var i = 0u; i < LANES; i++) { total += partial[lane + i]; }
    @if(!split) put(row, column, total);
    @else { if (column < params.n) { y[(part * params.m + row) * params.n + column] = total; } }
  }
}

@compute @workgroup_size(64)
fn matvec_sum(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * 64u + lane;
  if (i >= params.m * params.n) { return; }
  var total = 0.0;
  for (var part = 0u; part < params.parts; part++) { total += sums[part * params.m * params.n + i]; }
  put(i / params.n, i % params.n, total);
}
