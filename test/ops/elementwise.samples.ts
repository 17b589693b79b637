import * as ops from "../../src/ops/elementwise.ts";
import * as ref from "../../src/reference/elementwise.ts";
import { type Draw, opSamples } from "./suite.ts";

/** Sizes that matter to kernels over elements: nothing, one, odd, whole vec4s, several workgroups. */
const shapes: Record<string, number[]> = {
  "no elements": [0, 3], "a scalar": [], "one element": [1, 1], "an odd size": [3, 5, 7],
  "whole vec4s": [2, 8], "several workgroups": [5, 2052], "several workgroups of an odd size": [3, 1373],
};
const each = (args: (r: Draw, shape: number[]) => unknown[]) =>
  Object.entries(shapes).map(([name, shape]) => ({ name, args: (r: Draw) => args(r, shape) }));

const column = (r: Draw, values: number[]) => [r.of([values.length], values)];
const EXTREMES = [0, -0, 1e-8, -1e-8, 30, -30, 88, -88, 1e4, -1e4];

export default [
  opSamples({
    op: ops.add, reference: ref.add, vjp: ref.add_vjp,
    samples: each((r, shape) => [r.normal(shape), r.normal(shape)]),
    errors: [{
      name: "another shape of equal size", args: (r) => [r.normal([2, 4]), r.normal([4, 2])],
      message: /add: b must be \[2, 4\], found \[4, 2\]/,
    }],
  }),
  opSamples({
    op: ops.add_bias, reference: ref.add_bias, vjp: ref.add_bias_vjp,
    samples: Object.entries(shapes).filter(([, shape]) => shape.length > 0).flatMap(([name, shape]) => [
      { name, args: (r: Draw) => [r.normal(shape), r.normal([shape.at(-1)!]), null] },
      { name: `${name}, a residual`, args: (r: Draw) => [
        r.normal(shape), r.normal([shape.at(-1)!]), r.normal(shape)] },
    ]),
    errors: [
      {
        name: "bias of the wrong width", args: (r) => [r.normal([2, 4]), r.normal([3]), null],
        message: /add_bias: bias must be \[4\], found \[3\]/,
      },
      {
        name: "a residual of another shape", message: /add_bias: residual must be \[2, 4\], found \[4, 2\]/,
        args: (r) => [r.normal([2, 4]), r.normal([4]), r.normal([4, 2])],
      },
    ],
  }),
  opSamples({
    op: ops.multiply, reference: ref.multiply, vjp: ref.multiply_vjp,
    samples: each((r, shape) => [r.normal(shape), r.normal(shape)]),
    errors: [{
      name: "another shape of equal size", args: (r) => [r.normal([2, 4]), r.normal([4, 2])],
      message: /multiply: b must be \[2, 4\], found \[4, 2\]/,
    }],
  }),
  opSamples({
    op: ops.accumulate, reference: ref.accumulate,
    samples: each((r, shape) => [r.normal(shape), r.normal(shape)]),
    errors: [{
      name: "another shape", args: (r) => [r.normal([2, 4]), r.normal([8])],
      message: /accumulate: src must be \[2, 4\], found \[8\]/,
    }],
  }),
  opSamples({
    op: ops.scale, reference: ref.scale, vjp: ref.scale_vjp,
    samples: [
      ...each((r, shape) => [r.normal(shape), -1.75]),
      { name: "by zero", args: (r) => [r.normal([3, 4]), 0] },
    ],
  }),
  opSamples({
    op: ops.relu2, reference: ref.relu2, vjp: ref.relu2_vjp,
    samples: [
      ...each((r, shape) => [r.normal(shape)]),
      { name: "large values", args: (r) => [r.normal([4, 8], 1e4)] },
      { name: "all negative", args: (r) => [r.uniform([5, 4], -2, -1)] },
    ],
  }),
  opSamples({
    op: ops.silu, reference: ref.silu, vjp: ref.silu_vjp,
    samples: [
      ...each((r, shape) => [r.normal(shape, 3)]),
      { name: "extreme values", args: (r) => column(r, EXTREMES) },
      { name: "large negative values", args: (r) => [r.uniform([8], -100, -5)] },
    ],
  }),
  opSamples({
    op: ops.split_columns, reference: ref.split_columns, vjp: ref.split_columns_vjp,
    samples: [
      { name: "no rows", args: (r) => [r.normal([0, 6]), [2, 4]] },
      { name: "widths of whole vec4s", args: (r) => [r.normal([2, 3, 24]), [8, 12, 4]] },
      { name: "one odd width", args: (r) => [r.normal([2, 3, 23]), [8, 12, 3]] },
      { name: "odd widths", args: (r) => [r.normal([5, 7]), [1, 4, 2]] },
      { name: "an empty part", args: (r) => [r.normal([3, 8]), [4, 0, 4]] },
      { name: "one part", args: (r) => [r.normal([4, 5]), [5]] },
      { name: "five parts", args: (r) => [r.normal([6, 40]), [4, 16, 8, 5, 7]] },
      { name: "one row", args: (r) => [r.normal([9]), [4, 5]] },
      { name: "many rows", args: (r) => [r.normal([300, 40]), [16, 20, 4]] },
      { name: "wide rows", args: (r) => [r.normal([3, 700]), [256, 444]] },
    ],
    errors: [{
      name: "widths that do not add up", args: (r) => [r.normal([3, 8]), [4, 5]],
      message: /split_columns: the sum of the widths must be 8, found 9/,
    }],
  }),
  opSamples({
    op: ops.concat_columns, reference: ref.concat_columns, vjp: ref.concat_columns_vjp,
    samples: [
      { name: "no rows", args: (r) => [r.normal([0, 2]), r.normal([0, 3])] },
      { name: "whole vec4s", args: (r) => [r.normal([2, 5, 8]), r.normal([2, 5, 4])] },
      { name: "odd widths", args: (r) => [r.normal([6, 3]), r.normal([6, 5])] },
      { name: "an empty half", args: (r) => [r.normal([6, 4]), r.normal([6, 0])] },
      { name: "many rows", args: (r) => [r.normal([200, 12]), r.normal([200, 12])] },
    ],
    errors: [{
      name: "other rows", args: (r) => [r.normal([3, 8]), r.normal([4, 8])],
      message: /concat_columns: b must be \[3, 8\], found \[4, 8\]/,
    }],
  }),
  opSamples({
    op: ops.shift_rows, reference: ref.shift_rows, vjp: ref.shift_rows_vjp,
    samples: [
      { name: "by nothing", args: (r) => [r.normal([2, 5, 4]), 0] },
      { name: "by one", args: (r) => [r.normal([3, 6, 8]), 1] },
      { name: "an odd width", args: (r) => [r.normal([2, 7, 5]), 3] },
      { name: "by everything", args: (r) => [r.normal([2, 4, 4]), 4] },
      { name: "no batch", args: (r) => [r.normal([0, 4, 4]), 1] },
      { name: "long rows", args: (r) => [r.normal([2, 70, 20]), 2] },
    ],
    errors: [
      {
        name: "a shift beyond the end", args: (r) => [r.normal([2, 4, 4]), 5],
        message: /shift_rows: n must be .* 0 to 4, found 5/,
      },
      {
        name: "a matrix", args: (r) => [r.normal([4, 4]), 1],
        message: /shift_rows: x must be \[B, L, D\], found \[4, 4\]/,
      },
    ],
  }),
];
