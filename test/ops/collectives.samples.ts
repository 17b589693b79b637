import "../../src/ops/collectives.ts";
import { type Op, registry } from "../../src/ops/op.ts";
import * as ref from "../../src/reference/collectives.ts";
import { type Draw, opSamples } from "./suite.ts";

const op = (name: string) => registry.get(name) as Op;
const how = (g: number) => ({
  group: "tp", algorithm: "direct", ranks: Array.from({ length: g }, (_, i) => i),
});
const ranks = (r: Draw, g: number, shape: number[]) => Array.from({ length: g }, () => r.normal(shape));

/** Ranks and shapes: one, a few, more than a launch takes, odd sizes, whole vec4s, nothing. */
const sums: readonly [string, number, number[]][] = [
  ["one rank", 1, [3, 4]], ["two ranks", 2, [3, 5, 7]], ["eight ranks", 8, [2, 8]],
  ["no elements", 2, [0, 4]],
];
const cuts: readonly [string, number, number[], number][] = [
  ["rows", 2, [4, 3], 0], ["positions of two rows", 2, [2, 4, 8], 1], ["odd columns", 3, [2, 9], 1],
  ["eight ranks", 8, [8, 4], 0], ["no rows", 2, [0, 4], 1],
];
const alike = (name: string, message: RegExp) => ({
  name: "ranks that differ in shape",
  args: (r: Draw) => [{ ...how(2), dim: 0, sum: true }, r.normal([2, 4]), r.normal([4, 4])],
  message: new RegExp(`${name}.*${message.source}`),
});
const uneven = (name: string) => ({
  name: "an extent that does not divide",
  args: (r: Draw) => [{ ...how(2), dim: 0, sum: true }, ...ranks(r, 2, [3, 4])],
  message: new RegExp(`${name}: the extent of dimension 0 must be a multiple of 2 ranks, found 3`),
});

export default [
  ...[
    { name: "copy_to", reference: ref.copy_to, vjp: ref.copy_to_vjp },
    { name: "reduce_from", reference: ref.reduce_from, vjp: ref.reduce_from_vjp },
  ].map(({ name, reference, vjp }) => opSamples({
    op: op(name), reference, vjp, straightThrough: true,
    samples: sums.map(([what, g, shape]) => ({ name: what, args: (r) => [how(g), ...ranks(r, g, shape)] })),
    errors: [alike(name, /x must be \[2, 4\], found \[4, 4\]/)],
  })),
  opSamples({
    op: op("largest_of"), reference: ref.largest_of,
    samples: [
      ...sums.map(([name, g, shape]) => ({
        name, tolerance: 0, args: (r: Draw) => [how(g), ...ranks(r, g, shape)],
      })),
      {
        name: "whole numbers, in a ring", tolerance: 0, args: (r: Draw) => [{ ...how(3), algorithm: "ring" },
          ...Array.from({ length: 3 }, () => r.of([9], [...r.integers([9], 0, 99).data], "u32"))],
      },
    ],
    errors: [alike("largest_of", /x must be \[2, 4\], found \[4, 4\]/)],
  }),
  opSamples({
    op: op("broadcast"), reference: ref.broadcast, vjp: ref.broadcast_vjp,
    samples: (["direct", "ring"] as const).flatMap((algorithm) => sums.map(([name, g, shape]) => ({
      name: `${name}, ${algorithm}`,
      args: (r: Draw) => [{ ...how(g), algorithm, root: g - 1 }, ...ranks(r, g, shape)],
    }))),
    errors: [{
      name: "a root that is no rank", args: (r) => [{ ...how(2), root: 2 }, ...ranks(r, 2, [3])],
      message: /broadcast: root must be below 2, found 2/,
    }],
  }),
  opSamples({
    op: op("scatter"), reference: ref.scatter, vjp: ref.scatter_vjp, straightThrough: true,
    samples: cuts.map(([name, g, shape, dim]) => ({
      name, args: (r) => [{ ...how(g), dim }, ...ranks(r, g, shape)],
    })),
    errors: [uneven("scatter")],
  }),
  opSamples({
    op: op("gather"), reference: ref.gather, vjp: ref.gather_vjp, straightThrough: true,
    samples: [true, false].flatMap((sum) => cuts.map(([name, g, shape, dim]) => ({
      name: `${name}, ${sum ? "used differently" : "used alike"}`,
      args: (r: Draw) => [{ ...how(g), dim, sum }, ...ranks(r, g, shape)],
    }))),
    errors: [alike("gather", /x must be \[2, 4\], found \[4, 4\]/)],
  }),
  opSamples({
    op: op("reduce_scatter"), reference: ref.reduce_scatter, vjp: ref.reduce_scatter_vjp,
    samples: cuts.map(([name, g, shape, dim]) => ({
      name, args: (r) => [{ ...how(g), dim }, ...ranks(r, g, shape)],
    })),
    errors: [uneven("reduce_scatter")],
  }),
  opSamples({
    op: op("send"), reference: ref.send, vjp: ref.send_vjp,
    samples: [
      { name: "a matrix", args: (r) => [how(1), r.normal([3, 5]), null] },
      { name: "nothing", args: (r) => [how(1), r.normal([0, 5]), null] },
    ],
  }),
  opSamples({
    op: op("all_to_all"), reference: ref.all_to_all, vjp: ref.all_to_all_vjp,
    samples: ([1, 2] as const).flatMap((cut) => ([
      ["two ranks", 2, [1, 4, 6]], ["rows of a batch", 2, [3, 4, 8]], ["three ranks", 3, [2, 3, 9]],
    ] as const).map(([name, g, shape]) => ({
      name: `${name}, dimension ${cut}`, args: (r: Draw) => [{ ...how(g), cut }, ...ranks(r, g, [...shape])],
    }))),
    errors: [{
      name: "columns that do not divide", args: (r) => [{ ...how(2), cut: 2 }, ...ranks(r, 2, [1, 4, 5])],
      message: /all_to_all: the extent of dimension 2 must be a multiple of 2 ranks, found 5/,
    }],
  }),
];
