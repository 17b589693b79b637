// y[m] = W x[m] (+ bias, then relu2, then + residual) for few rows m and a block-quantised W: decoding.
//
// x f32 [M, K], W [N, K] as codes and scales (lib/blocks.wgsl), y f32 [M, N]; K is whole units. Two
// shapes of the same sum:
//
// block_matvec_quad (software adapters): an invocation computes ROWS rows of W alone. The four invocations of
//   a quad meet the same units of x: each loads a quarter and shows it to the others. The kernel relies on
//   invocations 4 i .. 4 i + 3 being a quad, as they are in a workgroup of one dimension.
// block_matvec (GPUs): 32 invocations share four rows, neighbours read neighbouring units, and a workgroup
//   of 128 computes 16 rows.
//
// `grouped`: row m uses the matrix of the expert e with offsets[e] <= m < offsets[e + 1].
// Accumulation: f32, per unit first, in a fixed order.

import package::lib::index::workgroup_index;
import package::lib::blocks::{raw, small_values, scale_index, scale_value, STEP, OFFSET, UNIT, WORDS};

struct Params { m: u32, n: u32, k: u32, experts: u32, outer_rows: u32 }  // rows that share an outer scale

@group(0) @binding(0) var<storage, read> x: array<vec4f>;
@if(e2m1) @group(0) @binding(1) var<storage, read> codes: array<vec2u>;
@else @group(0) @binding(1) var<storage, read> codes: array<vec4u>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> offsets: array<u32>;
@group(0) @binding(6) var<storage, read> residual: array<f32>;
@group(0) @binding(7) var<storage, read> outer: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 16;                        // of block_matvec_quad
@if(rows8) const ROWS: u32 = 8;
@else const ROWS: u32 = 4;
const VECTORS: u32 = max(WORDS / 4u, 1u);     // vectors of codes per unit
const PART: u32 = UNIT / 4u;                  // vectors of x per unit

// Where the matrix of a row begins; `experts` for a row that no expert owns.
fn expert_of(row: u32) -> u32 {
  @if(!grouped) return 0u;
  @else {
    var e = 0u;
    while (e < params.experts && offsets[e + 1u] <= row) { e++; }
    return e;
  }
}

// The x of one unit, four to a column; of q8 and q4 times STEP, and the sum of x times OFFSET.
@if(e2m1 || e4m3 || e5m2) struct Inputs { first: mat4x4f }
@else struct Inputs { first: mat4x4f, last: mat4x4f, offset: f32 }

// One row of W times one unit of x.
fn partial_sum(at: u32, u: Inputs) -> f32 {
  let c = codes[at * VECTORS];
  let scale = scale_value(scales[scale_index(at)], at);
  @if(e2m1) {
    var d = small_values(c.x) * u.first[0];
    d = fma(small_values(c.x >> 16u), u.first[1], d);
    d = fma(small_values(c.y), u.first[2], d);
    d = fma(small_values(c.y >> 16u), u.first[3], d);
    return (d.x + d.y + d.z + d.w) * scale;
  }
  @elif(e4m3 || e5m2) {
    var d = small_values(c.x) * u.first[0];
    d = fma(small_values(c.y), u.first[1], d);
    d = fma(small_values(c.z), u.first[2], d);
    d = fma(small_values(c.w), u.first[3], d);
    return (d.x + d.y + d.z + d.w) * scale;
  }
  @elif(q4) {
    let h = c >> vec4u(4u);
    var d = raw(c.x) * u.first[0];
    d = fma(raw(h.x), u.first[1], d);
    d = fma(raw(c.y), u.first[2], d);
    d = fma(raw(h.y), u.first[3], d);
    d = fma(raw(c.z), u.last[0], d);
    d = fma(raw(h.z), u.last[1], d);
    d = fma(raw(c.w), u.last[2], d);
    d = fma(raw(h.w), u.last[3], d);
    return (d.x + d.y + d.z + d.w - u.offset) * scale;
  }
  @else {
    let e = codes[at * VECTORS + 1u];
    var d = raw(c.x) * u.first[0];
    d = fma(raw(c.y), u.first[1], d);
    d = fma(raw(c.z), u.first[2], d);
    d = fma(raw(c.w), u.first[3], d);
    d = fma(raw(e.x), u.last[0], d);
    d = fma(raw(e.y), u.last[1], d);
    d = fma(raw(e.z), u.last[2], d);
    d = fma(raw(e.w), u.last[3], d);
    return (d.x + d.y + d.z + d.w - u.offset) * scale;
  }
}

fn put(row: u32, column: u32, expert: u32, sum: f32) {
  if (column >= params.n) { return; }
  var value = sum;
  @if(outer) value *= outer[(expert * params.n + column) / params.outer_rows];
  @if(bias) value += bias[column];
  @if(relu2) value = max(value, 0.0) * max(value, 0.0);
  @if(residual) value += residual[row * params.n + column];
  y[row * params.n + column] = value;
}

// Quads enter and leave loops as a whole, which the uniformity analysis cannot see.
@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn shared_inputs(at: u32, q: u32) -> Inputs {
  let u = x[at + q];
  @if(e2m1 || e4m3 || e5m2) {
    return Inputs(
      mat4x4f(quadBroadcast(u, 0u), quadBroadcast(u, 1u), quadBroadcast(u, 2u), quadBroadcast(u, 3u)));
  }
  @else {
    let v = x[at + 4u + q];
    var sum = (u + v) * OFFSET;
    sum += quadSwapX(sum);
    sum += quadSwapY(sum);
    let a = u * STEP;
    let b = v * STEP;
    return Inputs(
      mat4x4f(quadBroadcast(a, 0u), quadBroadcast(a, 1u), quadBroadcast(a, 2u), quadBroadcast(a, 3u)),
      mat4x4f(quadBroadcast(b, 0u), quadBroadcast(b, 1u), quadBroadcast(b, 2u), quadBroadcast(b, 3u)),
      sum.x + sum.y + sum.z + sum.w);
  }
}

@if(subgroups) @compute @workgroup_size(WG)
fn block_matvec_quad(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let pieces = ((params.n + ROWS - 1u) / ROWS + 3u) / 4u * 4u; // per row of x; whole quads
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / pieces;
  if (row >= params.m) { return; }
  let expert = expert_of(row);
  if (expert >= max(params.experts, 1u)) { return; }
  let units = params.k / UNIT;
  let column = i % pieces * ROWS;
  let last = params.n - 1u;
  let w = (expert * params.n + min(column + vec4u(0u, 1u, 2u, 3u), vec4u(last))) * units;
  var s = vec4f();
  @if(rows8) let v = (expert * params.n + min(column + vec4u(4u, 5u, 6u, 7u), vec4u(last))) * units;
  @if(rows8) var t = vec4f();
  for (var b = 0u; b < units; b++) {
    let u = shared_inputs((row * units + b) * PART, lane % 4u);
    s += vec4f(partial_sum(w.x + b, u), partial_sum(w.y + b, u), partial_sum(w.z + b, u),
      partial_sum(w.w + b, u));
    @if(rows8) t += vec4f(partial_sum(v.x + b, u), partial_sum(v.y + b, u), partial_sum(v.z + b, u),
      partial_sum(v.w + b, u));
  }
  for (var j = 0u; j < 4u; j++) {
    put(row, column + j, expert, s[j]);
    @if(rows8) put(row, column + 4u + j, expert, t[j]);
  }
}

const LANES: u32 = 32;                        // invocations per four rows of block_matvec
var<workgroup> parts: array<vec4f, 128>;

@compute @workgroup_size(128)
fn block_matvec(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let pieces = (params.n + 15u) / 16u;
  let group = workgroup_index(wid, nwg);
  let row = group / pieces;
  let column = group % pieces * 16u + lane / LANES * 4u;
  var expert = params.experts;
  if (row < params.m) { expert = expert_of(row); }
  let works = row < params.m && column < params.n && expert < max(params.experts, 1u);
  var s = vec4f();
  if (works) {
    let units = params.k / UNIT;
    let w = (expert * params.n + min(column + vec4u(0u, 1u, 2u, 3u), vec4u(params.n - 1u))) * units;
    for (var b = lane % LANES; b < units; b += LANES) {
      let u = own_inputs((row * units + b) * PART);
      s += vec4f(partial_sum(w.x + b, u), partial_sum(w.y + b, u), partial_sum(w.z + b, u),
        partial_sum(w.w + b, u));
    }
  }
  parts[lane] = s;
  for (var half = LANES / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (lane % LANES < half) { parts[lane] += parts[lane + half]; }
  }
  if (works && lane % LANES == 0u) {
    let total = parts[lane];
    for (var j = 0u; j < 4u; j++) { put(row, column + j, expert, total[j]); }
  }
}

fn own_inputs(at: u32) -> Inputs {
  let first = mat4x4f(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
  @if(e2m1 || e4m3 || e5m2) return Inputs(first);
  @else {
    let last = mat4x4f(x[at + 4u], x[at + 5u], x[at + 6u], x[at + 7u]);
    let sum = (first * vec4f(1.0) + last * vec4f(1.0)) * OFFSET;
    return Inputs(mat4x4f(first[0] * STEP, first[1] * STEP, first[2] * STEP, first[3] * STEP),
      mat4x4f(last[0] * STEP, last[1] * STEP, last[2] * STEP, last[3] * STEP),
      sum.x + sum.y + sum.z + sum.w);
  }
}
