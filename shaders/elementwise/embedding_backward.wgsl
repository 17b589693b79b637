// dW[v] = sum of dy[t] over the tokens t with ids[t] = begin + v, t ascending, in f32: no float atomics,
// the same bits every time.
//
// ids [T], dy [T, D], dW [V, D]. Work and memory grow with T + V, not with T * V, whatever the ids are:
//  link: 32 lanes each own a stretch of the tokens and walk it backwards, putting every token in front of the
//    list of its id in its own column of head [V, 32]. mask [V] has a bit for every lane that met the id, so
//    head needs no clearing; `or` is the only atomic, and its result does not depend on the order. One
//    workgroup.
//  gather: one invocation sums one vector (`vec4`: four columns) of one row of dW: lanes ascending, then
//  along each list.

import package::lib::index::workgroup_index;

@if(vec4) alias V = vec4f;
@else alias V = f32;

struct Params { tokens: u32, vocab: u32, cols: u32, begin: u32 }  // cols in vectors

@group(0) @binding(0) var<storage, read> ids: array<i32>;
@group(0) @binding(1) var<storage, read> dy: array<V>;
@group(0) @binding(2) var<storage, read_write> mask: array<atomic<u32>>;   // [V], zero before `link`
@group(0) @binding(3) var<storage, read_write> head: array<u32>;           // [V, 32]
@group(0) @binding(4) var<storage, read_write> next: array<u32>;           // [T]
@group(0) @binding(5) var<storage, read_write> dweight: array<V>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
const LANES: u32 = 32;
const NONE: u32 = 0xffffffff;

@compute @workgroup_size(LANES)
fn link(@builtin(local_invocation_index) lane: u32) {
  let stretch = (params.tokens + LANES - 1u) / LANES;
  let begin = lane * stretch;
  for (var t = min(begin + stretch, params.tokens); t > begin; t--) {
    let id = u32(ids[t - 1u]) - params.begin; // what is below becomes a large one
    if (id >= params.vocab) { continue; }
    let met = atomicOr(&mask[id], 1u << lane);
    let at = id * LANES + lane;
    if ((met & (1u << lane)) == 0u) {
      next[t - 1u] = NONE;
    } else {
      next[t - 1u] = head[at];
    }
    head[at] = t - 1u;
  }
}

@compute @workgroup_size(WG)
fn gather(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.cols;
  if (row >= params.vocab) { return; }
  let column = i % params.cols;
  var sum = V();
  var lanes = atomicLoad(&mask[row]);
  while (lanes != 0u) {
    var t = head[row * LANES + firstTrailingBit(lanes)];
    while (t < params.tokens) {               // NONE is no token
      sum += dy[t * params.cols + column];
      t = next[t];
    }
    lanes &= lanes - 1u;
  }
  dweight[i] = sum;
}
