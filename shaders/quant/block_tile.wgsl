// y = x W^T (+ bias, then relu2, then + residual) for many rows x and a block-quantised W, for GPUs.
//
// x f32 [M, K], W [N, K] as codes and scales (lib/blocks.wgsl), y f32 [M, N]; K is whole units. One
// workgroup of 16 x 16 invocations computes a tile of 64 rows x 64 columns: 16 k of both
// factors is staged in workgroup memory, the weights decoded, and every invocation keeps 4 x 4 sums. Staged
// vectors run along the rows of x and along the columns of W^T; lines of 17 vectors spread them over the
// memory banks. Entries past an edge are staged as zero, and products with them are not stored.
//
// `grouped`: the tiles are those of experts (lib/place.wgsl). Accumulation: f32, one accumulator per element,
// k ascending.

import package::lib::index::workgroup_index;
import package::lib::blocks::{raw, small_values, scale_index, scale_value, STEP, OFFSET, UNIT, WORDS};
import package::lib::place::place_of;

const TILE: u32 = 64;
const HALF: u32 = 16;
const LINE: u32 = 17;

struct Params { m: u32, n: u32, k: u32, row_tiles: u32, outer_rows: u32 }  // rows that share an outer scale

@group(0) @binding(0) var<storage, read> x: array<vec4f>;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> tiles: array<u32>;
@group(0) @binding(6) var<storage, read> residual: array<f32>;
@group(0) @binding(7) var<storage, read> outer: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

// Indexed by k, then by row or column: floats, so that a vector along k can be scattered.
var<workgroup> x_staged: array<f32, HALF * LINE * 4u>;
var<workgroup> w_staged: array<f32, HALF * LINE * 4u>;

// Four k of one row of W, number `group` of its row's groups of four.
fn weights_at(column: u32, group: u32) -> vec4f {
  let at = column * (params.k / UNIT) + group / (UNIT / 4u);
  let step = group % (UNIT / 4u);
  let scale = scale_value(scales[scale_index(at)], at);
  @if(e2m1) return small_values(codes[at * WORDS + step / 2u] >> (step % 2u * 16u)) * scale;
  @elif(e4m3 || e5m2) return small_values(codes[at * WORDS + step]) * scale;
  @elif(q4) return (raw(codes[at * WORDS + step / 2u] >> (step % 2u * 4u)) * STEP - OFFSET) * scale;
  @else return (raw(codes[at * WORDS + step]) * STEP - OFFSET) * scale;
}

fn staged(k: u32, i: u32) -> u32 {
  return k * LINE * 4u + i;
}

fn vector_of_x(k: u32, i: u32) -> vec4f {
  let at = staged(k, i);
  return vec4f(x_staged[at], x_staged[at + 1u], x_staged[at + 2u], x_staged[at + 3u]);
}

@compute @workgroup_size(16, 16)
fn block_tile(
  @builtin(local_invocation_index) lane: u32, @builtin(local_invocation_id) lid: vec3u,
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
) {
  let place = place_of(workgroup_index(wid, nwg), TILE);
  let row = place.row;
  let row_end = place.end;
  if (row >= row_end) { return; }
  let column = place.column;
  let expert = place.expert;

  // This invocation stages four k of one row of each factor.
  let own = lane / 4u;
  let part = lane % 4u;
  let groups = params.k / 4u;
  var s = mat4x4f();                          // column i: row 4 lid.y + i
  for (var first = 0u; first < groups; first += 4u) {
    var u = vec4f();
    var w = vec4f();
    if (row + own < row_end) { u = x[(row + own) * groups + first + part]; }
    if (column + own < params.n) { w = weights_at(expert * params.n + column + own, first + part); }
    workgroupBarrier();
    for (var j = 0u; j < 4u; j++) {
      x_staged[staged(part * 4u + j, own)] = u[j];
      w_staged[staged(part * 4u + j, own)] = w[j];
    }
    workgroupBarrier();
    for (var k = 0u; k < HALF; k++) {
      let a = vector_of_x(k, lid.y * 4u);
      let at = staged(k, lid.x * 4u);
      let b = vec4f(w_staged[at], w_staged[at + 1u], w_staged[at + 2u], w_staged[at + 3u]);
      s = mat4x4f(fma(vec4f(a.x), b, s[0]), fma(vec4f(a.y), b, s[1]), fma(vec4f(a.z), b, s[2]),
        fma(vec4f(a.w), b, s[3]));
    }
  }

  for (var i = 0u; i < 4u; i++) {
    let to_row = row + lid.y * 4u + i;
    if (to_row >= row_end) { break; }
    for (var j = 0u; j < 4u; j++) {
      let to_column = column + lid.x * 4u + j;
      if (to_column >= params.n) { break; }
      var value = s[i][j];
      @if(outer) value *= outer[(expert * params.n + to_column) / params.outer_rows];
      @if(bias) value += bias[to_column];
      @if(relu2) value = max(value, 0.0) * max(value, 0.0);
      @if(residual) value += residual[to_row * params.n + to_column];
      y[to_row * params.n + to_column] = value;
    }
  }
}
