import { take_ranges } from "../../src/ops/take_ranges.ts";
import * as ref from "../../src/reference/take_ranges.ts";
import { opSamples } from "./suite.ts";

export default opSamples({
  op: take_ranges, reference: ref.take_ranges, vjp: ref.take_ranges_vjp,
  samples: [
    { name: "some columns in another order", args: (r) => [r.normal([2, 3, 9]), 2, [[6, 2], [1, 3]]] },
    { name: "rows of a matrix", args: (r) => [r.normal([12, 4]), 0, [[4, 4], [0, 2]]] },
    { name: "all of a vector", args: (r) => [r.normal([7]), 0, [[3, 4], [0, 3]]] },
    { name: "repeats, whole vec4s", args: (r) => [r.normal([3, 8]), 1, [[0, 4], [0, 4], [4, 4], [4, 4]]] },
    { name: "repeats, odd widths", args: (r) => [r.normal([2, 6, 1]), 1, [[3, 3], [3, 3], [3, 3]]] },
    {
      name: "series of ranges",
      args: (r) => [r.normal([3, 12]), 1, [[0, 2], [6, 1], [9, 1], [2, 2], [7, 1], [10, 1], [4, 2], [8, 1]]],
    },
    { name: "nothing", args: (r) => [r.normal([2, 6]), 1, []] },
  ],
  errors: [
    {
      name: "a range outside", args: (r) => [r.normal([2, 6]), 1, [[4, 3]]],
      message: /take_ranges: a range must be within 6, found \[4, 3\]/,
    },
    {
      name: "ranges that overlap", args: (r) => [r.normal([2, 6]), 1, [[0, 3], [2, 3]]],
      message: /take_ranges: two ranges must be the same or share no index, found \[0, 3\] and \[2, 3\]/,
    },
    {
      name: "a dimension that is not there", args: (r) => [r.normal([2, 6]), 2, [[0, 3]]],
      message: /take_ranges: dim must be below 2, found 2/,
    },
  ],
});
