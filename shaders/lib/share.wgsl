// How the elements of an array are shared out among invocations: each makes EACH of them, four at a time,
// APART from one another. APART = WG lets neighbours touch neighbouring memory, as GPUs want it; APART = 1
// gives an invocation a stretch of its own, which suits CPUs: their caches and prefetchers follow it.
//
// The importing file declares the overrides WG, EACH (a multiple of 4) and APART (WG or 1).

fn first_element(group: u32, lane: u32) -> u32 {
  return group * WG * EACH + lane * select(1u, EACH, APART == 1u);
}
