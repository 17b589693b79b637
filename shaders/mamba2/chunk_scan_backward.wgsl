// Gradients of chunk_scan for x, dt, the decay exponent a, and D, position by position.
//
// With z_j from chunk_scan_transposed.wgsl and off_i from chunk_scan.wgsl:
//   dx_j  = dt_j (z_j + CB_jj dy_j) + D dy_j;   ddt_j = x_j . (z_j + CB_jj dy_j)
//   da_j  = dy_j . off_j - dt_j (x_j . z_j);    skip_j = x_j . dy_j, whose sum is dD
// The diagonal of CB has decay 1 whatever a is and is kept out of da: subtracting it afterwards would cancel
// badly.
//
// x, dy, off and dx [B,L,H,P] (dx holds z on entry), CB [B,nC,G,Q,Q]; dt, ddt and dcumsum (= da) [B,H,nC,Q],
// 0 past the end of the row; skip [B,L,H]. `inputs` comes first, `exponents` adds to its dcumsum. One
// invocation computes one position of one head.

import package::lib::index::workgroup_index;

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nheads * nchunks * chunk_size
}

@if(vec4) alias Cell = vec4f;
@else alias Cell = f32;

@group(0) @binding(0) var<storage, read> CB: array<f32>;
@group(0) @binding(1) var<storage, read> x: array<Cell>;
@group(0) @binding(2) var<storage, read> dt: array<f32>;
@group(0) @binding(3) var<storage, read> D: array<f32>;
@group(0) @binding(4) var<storage, read> dy: array<Cell>;
@group(0) @binding(5) var<storage, read> off: array<Cell>;
@group(0) @binding(6) var<storage, read_write> dx: array<Cell>;
@group(0) @binding(7) var<storage, read_write> ddt: array<f32>;
@group(0) @binding(8) var<storage, read_write> dcumsum: array<f32>;
@group(0) @binding(9) var<storage, read_write> skip: array<f32>;
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

struct Place {
  b: u32,
  h: u32,
  t: u32, // in the row; may lie past its end
}

fn place_of(id: u32) -> Place {
  let padded = params.nchunks * params.chunk_size;
  return Place(id / (padded * params.nheads), id / padded % params.nheads, id % padded);
}

@compute @workgroup_size(WG)
fn inputs(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let at = place_of(id);
  var through_z = Cell();
  var through_diagonal = Cell();
  let step = dt[id];
  if (at.t < params.seqlen) {
    let q = at.t % params.chunk_size;
    let group = at.h / (params.nheads / params.ngroups);
    let matrix = (at.b * params.nchunks + at.t / params.chunk_size) * params.ngroups + group;
    let cb = CB[(matrix * params.chunk_size + q) * params.chunk_size + q];
    let first = ((at.b * params.seqlen + at.t) * params.nheads + at.h) * params.headdim / WIDTH;
    for (var p = first; p < first + params.headdim / WIDTH; p++) {
      let z = dx[p];
      let diagonal = cb * dy[p];
      through_z += x[p] * z;
      through_diagonal += x[p] * diagonal;
      dx[p] = step * (z + diagonal) + D[at.h] * dy[p];
    }
  }
  ddt[id] = sum_of(through_z) + sum_of(through_diagonal);
  dcumsum[id] = -step * sum_of(through_z);
}

@compute @workgroup_size(WG)
fn exponents(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  let at = place_of(id);
  if (id >= params.total || at.t >= params.seqlen) {
    return;
  }
  let row = (at.b * params.seqlen + at.t) * params.nheads + at.h;
  let first = row * params.headdim / WIDTH;
  var da = Cell();
  var through_D = Cell();
  for (var p = first; p < first + params.headdim / WIDTH; p++) {
    da += dy[p] * off[p];
    through_D += dy[p] * x[p];
  }
  dcumsum[id] += sum_of(da);
  skip[row] = sum_of(through_D);
}
