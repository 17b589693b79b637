// Makes of a plan one in which an expert has at most `capacity` rows, and a multiple of `align` of them.
//
//   offsets [E + 1], slot_token [H] (sorted slot to choice; all of them, or those of some experts),
//   topk_weight [S] by choice
//   -> ends [E + 1], slots [R] (new slot to choice or NO_TOKEN), token_slot [S] (choice to slot or NO_SLOT)
//
// rank:    stays[s] = 1 for the slots that are kept: the `capacity` largest weights of an expert, the lower
//          token first on ties (by_weight), or its first slots; and everything else as if nothing was kept.
//          One invocation takes one slot, old or new.
// extents: ends; one invocation, for each expert begins where the one before it ends
// scatter: kept slots keep their order; one invocation takes one old slot
// keep:    kept_idx [S] = topk_idx [S] for the choices that have a slot, NO_CHOICE for the others
// Source: GShard (arXiv 2006.16668) section 2.2.
import package::lib::index::workgroup_index;
import package::lib::plan::NO_CHOICE;
import package::lib::plan::NO_SLOT;
import package::lib::plan::NO_TOKEN;

override WG: u32 = 64;

struct Params {
  choices: u32,
  held: u32,
  experts: u32,
  rows: u32,
  capacity: u32,
  align: u32,
  by_weight: u32,
  pad: u32, // every expert has `capacity` rows, used or not
}

@group(0) @binding(0) var<storage, read> offsets: array<u32>;
@group(0) @binding(1) var<storage, read> slot_token: array<u32>;
@group(0) @binding(2) var<storage, read> topk_weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> stays: array<u32>;
@group(0) @binding(4) var<storage, read_write> ends: array<u32>;
@group(0) @binding(5) var<storage, read_write> slots: array<u32>;
@group(0) @binding(6) var<storage, read_write> token_slot: array<u32>;
@group(0) @binding(7) var<storage, read> topk_idx: array<u32>;
@group(0) @binding(8) var<storage, read_write> kept_idx: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

// Where an expert's slots begin, and the choice of a slot; what the tables hold never leads out of them.
fn start_of(expert: u32) -> u32 {
  return min(offsets[expert], params.held);
}

fn choice_of(slot: u32) -> u32 {
  return min(slot_token[slot], params.choices - 1u);
}

fn expert_of(slot: u32) -> u32 {
  var low = 0u;
  var high = params.experts - 1u;
  while (low < high) {
    let middle = (low + high) / 2u;
    if (offsets[middle + 1u] <= slot) {
      low = middle + 1u;
    } else {
      high = middle;
    }
  }
  return low;
}

@compute @workgroup_size(WG)
fn rank(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let slot = workgroup_index(wid, nwg) * WG + lane;
  if (slot < params.rows) {
    slots[slot] = NO_TOKEN;
  }
  if (slot >= params.choices) {
    return;
  }
  token_slot[slot] = NO_SLOT; // of the choice with this number
  let e = expert_of(slot);
  let first = start_of(e);
  let end = start_of(e + 1u);
  if (slot >= end) { // of no expert
    stays[slot] = 0u;
    return;
  }
  var before = slot - first;
  if (params.by_weight != 0u && end - first > params.capacity) {
    let mine = topk_weight[choice_of(slot)];
    before = 0u;
    for (var other = first; other < end; other++) {
      let weight = topk_weight[choice_of(other)];
      before += u32(weight > mine || (weight == mine && other < slot));
    }
  }
  stays[slot] = u32(before < params.capacity);
}

@compute @workgroup_size(1)
fn extents() {
  var end = 0u;
  ends[0] = 0u;
  for (var e = 0u; e < params.experts; e++) {
    let held = start_of(e + 1u) - start_of(e);
    let kept = select(min(held, params.capacity), params.capacity, params.pad != 0u);
    end += (kept + params.align - 1u) / params.align * params.align;
    ends[e + 1u] = end;
  }
}

@compute @workgroup_size(WG)
fn scatter(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let slot = workgroup_index(wid, nwg) * WG + lane;
  if (slot >= params.choices || stays[slot] == 0u) {
    return;
  }
  let e = expert_of(slot);
  let first = start_of(e);
  var place = slot - first;
  if (params.by_weight != 0u && start_of(e + 1u) - first > params.capacity) {
    place = 0u;
    for (var other = first; other < slot; other++) {
      place += stays[other];
    }
  }
  let choice = choice_of(slot);
  let at = ends[e] + place;
  if (at >= params.rows) {
    return;
  }
  slots[at] = choice;
  token_slot[choice] = at;
}

@compute @workgroup_size(WG)
fn keep(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let choice = workgroup_index(wid, nwg) * WG + lane;
  if (choice >= params.choices) {
    return;
  }
  kept_idx[choice] = select(topk_idx[choice], NO_CHOICE, token_slot[choice] == NO_SLOT);
}
