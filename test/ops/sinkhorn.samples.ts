import { sinkhorn } from "../../src/ops/sinkhorn.ts";
import * as ref from "../../src/reference/sinkhorn.ts";
import { opSamples } from "./suite.ts";

// Rounding may end it a round earlier or later, which moves the result by less than its criterion.
const tolerance = 2e-4;

export default opSamples({
  op: sinkhorn, reference: ref.sinkhorn,
  samples: [
    { name: "no tokens", args: (r) => [r.normal([0, 4])] },
    { name: "one token", args: (r) => [r.normal([1, 8])], tolerance },
    { name: "one expert", args: (r) => [r.normal([5, 1])], tolerance },
    { name: "odd sizes, more tokens than invocations", args: (r) => [r.normal([133, 13], 2)], tolerance },
    { name: "equal logits", args: (r) => [r.of([4, 4], Array(16).fill(3))], tolerance },
    { name: "more experts than invocations", args: (r) => [r.normal([5, 70])], tolerance },
  ],
  errors: [
    {
      name: "rank 3", args: (r) => [r.normal([1, 2, 4])],
      message: /sinkhorn.*logits.*\[T, E\].*\[1, 2, 4\]/,
    },
    { name: "no experts", args: (r) => [r.normal([2, 0])], message: /sinkhorn.*with an expert.*\[2, 0\]/ },
  ],
});
