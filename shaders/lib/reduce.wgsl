// Sum and maximum over the WG invocations of a workgroup, in a fixed order (same inputs, same bits).
//
// The importing file declares `override WG: u32` and uses it as its workgroup size; `lane` is
// local_invocation_index. Every invocation must call, in uniform control flow, and every one receives the
// result. Two barriers for any WG: eight strands first, then the eight partial results in registers. A tree
// of log2(WG) barriers is dearer wherever a barrier costs more than a handful of loads, as it does on CPUs.

const REDUCE_STRANDS: u32 = 8;

var<workgroup> reduce_lanes: array<f32, WG>;
var<workgroup> reduce_strands: array<f32, REDUCE_STRANDS>;

fn workgroup_sum(value: f32, lane: u32) -> f32 {
  reduce_lanes[lane] = value;
  workgroupBarrier();
  if (lane < REDUCE_STRANDS) {
    var strand = 0.0;
    for (var i = lane; i < WG; i += REDUCE_STRANDS) {
      strand += reduce_lanes[i];
    }
    reduce_strands[lane] = strand;
  }
  // No barrier is needed at the end: a next call writes `reduce_strands` only behind its own first barrier.
  workgroupBarrier();
  var total = 0.0;
  for (var i = 0u; i < min(WG, REDUCE_STRANDS); i++) {
    total += reduce_strands[i];
  }
  return total;
}

fn workgroup_max(value: f32, lane: u32) -> f32 {
  reduce_lanes[lane] = value;
  workgroupBarrier();
  if (lane < REDUCE_STRANDS) {
    var strand = reduce_lanes[lane];
    for (var i = lane; i < WG; i += REDUCE_STRANDS) {
      strand = max(strand, reduce_lanes[i]);
    }
    reduce_strands[lane] = strand;
  }
  workgroupBarrier();
  var total = reduce_strands[0];
  for (var i = 1u; i < min(WG, REDUCE_STRANDS); i++) {
    total = max(total, reduce_strands[i]);
  }
  return total;
}
