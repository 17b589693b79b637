// counts[row, e] += how often expert e occurs among the `per_row` choices of the row.
//
//   topk_idx u32 [rows * per_row], counts u32 [rows, E]. One invocation takes one choice. Integer sums do not
//   depend on their order, so atomics leave the result deterministic.
import package::lib::index::workgroup_index;

override WG: u32 = 64;

struct Params {
  choices: u32,
  per_row: u32,
  experts: u32,
}

@group(0) @binding(0) var<storage, read> topk_idx: array<u32>;
@group(0) @binding(1) var<storage, read_write> counts: array<atomic<u32>>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn expert_load(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let choice = workgroup_index(wid, nwg) * WG + lane;
  if (choice >= params.choices || topk_idx[choice] >= params.experts) {
    return;
  }
  atomicAdd(&counts[choice / params.per_row * params.experts + topk_idx[choice]], 1u);
}
