// S <- exp(dt A) S + dt x (outer) B,   y = S C + D x: one decode step of the scan.
//
// state S [B,H,P,N] changes in place, in f32; x and y [B,H,P], dt and dA = dt A [B,H] (from chunk_cumsum with
// one position), B and C [B,G,N] (head h reads group h / (H/G)), D [H]. One invocation updates one row
// S[b,h,p,:].

import package::lib::index::workgroup_index;

struct Params {
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  dstate: u32,
  total: u32, // batch * nheads * headdim
}

@if(vec4) alias Cell = vec4f;
@else alias Cell = f32;

@group(0) @binding(0) var<storage, read_write> state: array<Cell>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dt: array<f32>;
@group(0) @binding(3) var<storage, read> dA: array<f32>;
@group(0) @binding(4) var<storage, read> B: array<Cell>;
@group(0) @binding(5) var<storage, read> C: array<Cell>;
@group(0) @binding(6) var<storage, read> D: array<f32>;
@group(0) @binding(7) var<storage, read_write> y: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) const WIDTH = 4u;
@else const WIDTH = 1u;

@if(vec4) fn sum_of(product: vec4f) -> f32 {
  return product.x + product.y + product.z + product.w;
}
@else fn sum_of(product: f32) -> f32 {
  return product;
}

@compute @workgroup_size(WG)
fn selective_state_update(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let head = id / params.headdim; // b * nheads + h
  let h = head % params.nheads;
  let group = head / params.nheads * params.ngroups + h / (params.nheads / params.ngroups);
  let cells = params.dstate / WIDTH;
  let kept = exp(min(dA[head], 0.0));
  let added = dt[head] * x[id];
  var sum = Cell();
  for (var n = 0u; n < cells; n++) {
    let s = kept * state[id * cells + n] + added * B[group * cells + n];
    state[id * cells + n] = s;
    sum += s * C[group * cells + n];
  }
  y[id] = sum_of(sum) + D[h] * x[id];
}
