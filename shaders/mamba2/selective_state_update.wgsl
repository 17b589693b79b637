// S <- exp(dt A) S + dt x (outer) B,   y = S C + D x: one decode step of the scan.
//
// state S [B,H,P,N] changes in place, in f32. xBC [B, H P + 2 G N] is a token's x, B and C after each other
// (head h reads group h / (H/G)); dt_raw [B,H], dt = clamp(softplus(dt_raw + dt_bias), lo, hi), A =
// -exp(A_log), D, dt_bias and A_log [H]; y [B,H,P].
//
// A group of LANES invocations updates ROWS rows S[b,h,p,:], invocation l the cells (quads of n with `vec4`)
// l, l + LANES, ... With `subgroups` the group is a quad, which adds up by swaps, else it is one invocation.
// With `rows8` too (and `vec4`) it has eight rows, so that B and C are loaded once for eight: for software
// adapters.

import package::lib::index::workgroup_index;
import package::lib::activations::softplus;

struct Params {
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  dstate: u32,
  total: u32, // groups: batch * nheads * headdim / ROWS
  lo: f32,
  hi: f32,
}

@if(vec4) alias Cell = vec4f;
@else alias Cell = f32;
@if(vec4) const WIDTH = 4u;
@else const WIDTH = 1u;
@if(subgroups) const LANES = 4u;
@else const LANES = 1u;
@if(rows8 && subgroups && vec4) const ROWS = 8u;
@else const ROWS = 1u;

@group(0) @binding(0) var<storage, read_write> state: array<Cell>;
@group(0) @binding(1) var<storage, read> xBC: array<Cell>;
@group(0) @binding(2) var<storage, read> dt_raw: array<f32>;
@group(0) @binding(3) var<storage, read> A_log: array<f32>;
@group(0) @binding(4) var<storage, read> dt_bias: array<f32>;
@group(0) @binding(5) var<storage, read> D: array<f32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

@if(vec4) fn sum_of(product: vec4f) -> f32 {
  return product.x + product.y + product.z + product.w;
}
@else fn sum_of(product: f32) -> f32 {
  return product;
}

@if(vec4) fn element(at: u32) -> f32 {
  return xBC[at / 4u][at % 4u];
}
@else fn element(at: u32) -> f32 {
  return xBC[at];
}

// Updates one cell of the state; its part of y.
fn step(at: u32, kept: f32, added: f32, b: Cell, c: Cell) -> f32 {
  let s = kept * state[at] + added * b;
  state[at] = s;
  return sum_of(s * c);
}

// The same for four rows.
fn step_four(at: u32, kept: f32, added: vec4f, b: Cell, c: Cell) -> vec4f {
  let row = params.dstate / WIDTH;
  return vec4f(step(at, kept, added.x, b, c), step(at + row, kept, added.y, b, c),
    step(at + 2u * row, kept, added.z, b, c), step(at + 3u * row, kept, added.w, b, c));
}

@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn quad_sum(v: vec4f) -> vec4f {
  let pairs = v + quadSwapX(v);
  return pairs + quadSwapY(pairs);
}

@diagnostic(off, subgroup_uniformity) @compute @workgroup_size(WG)
fn selective_state_update(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * (WG / LANES) + lane / LANES;
  if (id >= params.total) {
    return;
  }
  let l = lane % LANES;
  let tiles = params.headdim / ROWS;
  let head = id / tiles; // b * nheads + h
  let h = head % params.nheads;
  let b = head / params.nheads;
  let p = id % tiles * ROWS;
  let inner = params.nheads * params.headdim;
  let token = b * (inner + 2u * params.ngroups * params.dstate);
  let x_at = token + h * params.headdim + p;
  let B_at = (token + inner + h / (params.nheads / params.ngroups) * params.dstate) / WIDTH;
  let C_at = B_at + params.ngroups * params.dstate / WIDTH;
  let row = (head * params.headdim + p) * params.dstate / WIDTH;
  let dt = clamp(softplus(dt_raw[head] + dt_bias[h]), params.lo, params.hi);
  let kept = exp(-dt * exp(A_log[h]));
  let cells = params.dstate / WIDTH;
  @if(rows8 && subgroups && vec4) {
    let x0 = xBC[x_at / 4u];
    let x1 = xBC[x_at / 4u + 1u];
    var low = vec4f();
    var high = vec4f();
    for (var n = l; n < cells; n += LANES) {
      let B = xBC[B_at + n];
      let C = xBC[C_at + n];
      low += step_four(row + n, kept, dt * x0, B, C);
      high += step_four(row + 4u * cells + n, kept, dt * x1, B, C);
    }
    low = quad_sum(low) + D[h] * x0;
    high = quad_sum(high) + D[h] * x1;
    let out = head * params.headdim + p + l;
    y[out] = low[l];
    y[out + 4u] = high[l];
  }
  @else {
    let x = element(x_at);
    var sum = vec4f();
    for (var n = l; n < cells; n += LANES) {
      sum.x += step(row + n, kept, dt * x, xBC[B_at + n], xBC[C_at + n]);
    }
    @if(subgroups) sum = quad_sum(sum);
    if (l == 0u) {
      y[head * params.headdim + p] = sum.x + D[h] * x;
    }
  }
}
