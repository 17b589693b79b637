// Stable counting sort of the S = T * K choices by expert.
//
//   topk_idx u32 [S] -> offsets [E + 1], slot_token [S]: sorted slot to choice, token_slot [S]: the inverse
//
// The choices are cut into pieces of `length`; histogram, E counters per piece, comes cleared.
//   count:         each piece counts its experts; one invocation per piece, so that no two touch a counter
//   scan_pieces:   counters become the number of the expert in earlier pieces; one invocation per expert
//   scan_experts:  offsets from the totals; one workgroup
//   scatter:       each piece places its choices in order; one invocation per piece
//   whole:         the four after each other in one workgroup, WG pieces that need not come cleared
//   small:         everything for S <= 128 in one workgroup, by counting who comes before
// `part`: of the experts from number `first` on; choices of others come last, as those of one expert more.
// `blocks`: by blocks of `first` experts, of which a token's ascending choices count the first alone. Choices
// that were dropped, NO_CHOICE, may stand between them and are others' in both cases.
// Nothing that decides the order is atomic, hence the same plan every time.
import package::lib::index::workgroup_index;
import package::lib::plan::NO_CHOICE;

override WG: u32 = 32;

struct Params {
  choices: u32,
  experts: u32,
  pieces: u32,
  length: u32,
  first: u32,
  topk: u32, // of blocks
}

@group(0) @binding(0) var<storage, read> topk_idx: array<u32>;
@group(0) @binding(1) var<storage, read_write> histogram: array<u32>; // [pieces, E]
@group(0) @binding(2) var<storage, read_write> offsets: array<u32>;
@group(0) @binding(3) var<storage, read_write> slot_token: array<u32>;
@group(0) @binding(4) var<storage, read_write> token_slot: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

const SMALL: u32 = 128;

var<workgroup> lane_total: array<u32, WG>;
var<workgroup> list: array<u32, SMALL>;

// An index beyond the experts would leave its row of counters; it is treated as the last expert.
fn expert_of(choice: u32) -> u32 {
  let e = topk_idx[choice];
  @if(part) let expert = e - params.first;
  @elif(blocks) let expert = block_of(choice, e);
  @else let expert = e;
  return min(expert, params.experts - 1u);
}

@if(blocks) fn block_of(choice: u32, e: u32) -> u32 {
  let own = e / params.first;
  let start = choice - choice % params.topk;
  for (var before = choice; before > start; before--) {
    let other = topk_idx[before - 1u];
    if (other == NO_CHOICE) { continue; }
    return select(own, params.experts - 1u, other / params.first == own);
  }
  return own;
}

@compute @workgroup_size(WG)
fn count(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  count_piece(workgroup_index(wid, nwg) * WG + lane);
}

fn count_piece(piece: u32) {
  if (piece >= params.pieces) {
    return;
  }
  let end = min((piece + 1u) * params.length, params.choices);
  for (var i = piece * params.length; i < end; i++) {
    histogram[piece * params.experts + expert_of(i)] += 1u;
  }
}

@compute @workgroup_size(WG)
fn scan_pieces(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  scan_expert(workgroup_index(wid, nwg) * WG + lane);
}

fn scan_expert(e: u32) {
  let E = params.experts;
  if (e >= E) {
    return;
  }
  var sum = 0u;
  var at = e;
  let end = params.pieces * E;
  // Four loads in flight before the first store: the loop is bound by the latency of memory.
  while (at + 3u * E < end) {
    let n = vec4u(histogram[at], histogram[at + E], histogram[at + 2u * E], histogram[at + 3u * E]);
    histogram[at] = sum;
    histogram[at + E] = sum + n.x;
    histogram[at + 2u * E] = sum + n.x + n.y;
    histogram[at + 3u * E] = sum + n.x + n.y + n.z;
    sum += n.x + n.y + n.z + n.w;
    at += 4u * E;
  }
  while (at < end) {
    let n = histogram[at];
    histogram[at] = sum;
    sum += n;
    at += E;
  }
  offsets[e + 1u] = sum; // a total for now
}

@compute @workgroup_size(WG)
fn scan_experts(@builtin(local_invocation_index) lane: u32) {
  scan_totals(lane);
}

fn scan_totals(lane: u32) {
  let size = (params.experts + WG - 1u) / WG;
  let first = lane * size;
  let end = min(first + size, params.experts);
  var sum = 0u;
  for (var e = first; e < end; e++) {
    sum += offsets[e + 1u];
  }
  lane_total[lane] = sum;
  workgroupBarrier();
  sum = 0u;
  for (var before = 0u; before < lane; before++) {
    sum += lane_total[before];
  }
  if (lane == 0u) {
    offsets[0] = 0u;
  }
  for (var e = first; e < end; e++) {
    sum += offsets[e + 1u];
    offsets[e + 1u] = sum;
  }
}

@compute @workgroup_size(WG)
fn scatter(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  scatter_piece(workgroup_index(wid, nwg) * WG + lane);
}

fn scatter_piece(piece: u32) {
  if (piece >= params.pieces) {
    return;
  }
  let end = min((piece + 1u) * params.length, params.choices);
  for (var i = piece * params.length; i < end; i++) {
    let e = expert_of(i);
    let earlier = histogram[piece * params.experts + e];
    histogram[piece * params.experts + e] = earlier + 1u;
    let slot = offsets[e] + earlier;
    slot_token[slot] = i;
    token_slot[i] = slot;
  }
}

@compute @workgroup_size(WG)
fn whole(@builtin(local_invocation_index) lane: u32) {
  for (var e = 0u; e < params.experts; e++) {
    histogram[lane * params.experts + e] = 0u;
  }
  count_piece(lane);
  storageBarrier();
  for (var e = lane; e < params.experts; e += WG) {
    scan_expert(e);
  }
  storageBarrier();
  scan_totals(lane);
  storageBarrier();
  scatter_piece(lane);
}

@compute @workgroup_size(WG)
fn small(@builtin(local_invocation_index) lane: u32) {
  let S = min(params.choices, SMALL);
  for (var i = lane; i < S; i += WG) {
    list[i] = expert_of(i);
  }
  workgroupBarrier();
  for (var i = lane; i < S; i += WG) {
    let e = list[i];
    var slot = 0u;
    for (var j = 0u; j < S; j++) {
      slot += u32(list[j] < e || (list[j] == e && j < i));
    }
    slot_token[slot] = i;
    token_slot[i] = slot;
  }
  for (var e = lane; e <= params.experts; e += WG) {
    var before = 0u;
    for (var j = 0u; j < S; j++) {
      before += u32(list[j] < e);
    }
    offsets[e] = before;
  }
}
