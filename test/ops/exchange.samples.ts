import { exchange_rows, limit_offsets, row_tables } from "../../src/ops/exchange.ts";
import * as ref from "../../src/reference/exchange.ts";
import { type Draw, type HostTensor, opSamples, type Sample } from "./suite.ts";

/** Where groups begin in the rows of every sender, with a column more that nobody reads. */
function offsetsOf(r: Draw, senders: number, groups: number, most: number): HostTensor {
  const values: number[] = [];
  for (let s = 0; s < senders; s++) {
    values.push(0);
    for (let g = 0; g < groups; g++) values.push(values.at(-1)! + Math.floor(r.next() * (most + 1)));
    values.push(999);
  }
  return r.of([senders, groups + 2], values, "u32");
}

interface Case {
  readonly groups: number;
  readonly blocks: number;
  readonly copies: number;
  readonly rows: number;
  readonly sends: number;
}

const cases: readonly [string, Case, number][] = [
  ["two blocks", { groups: 6, blocks: 2, copies: 1, rows: 40, sends: 24 }, 4],
  ["one group each", { groups: 4, blocks: 4, copies: 2, rows: 40, sends: 16 }, 4],
  ["copies alone", { groups: 5, blocks: 1, copies: 3, rows: 70, sends: 20 }, 4],
  ["hardly any rows", { groups: 9, blocks: 3, copies: 1, rows: 12, sends: 9 }, 1],
  ["no rows at all", { groups: 4, blocks: 2, copies: 1, rows: 8, sends: 8 }, 0],
  ["rows without a place", { groups: 6, blocks: 2, copies: 1, rows: 7, sends: 11 }, 3],
  ["more groups than invocations", { groups: 140, blocks: 4, copies: 1, rows: 600, sends: 500 }, 3],
];

/** Tables of all ranks, and of the way back. */
function exchange(r: Draw, shape: Case, most: number, reverse: boolean, draw: (rows: number) => HostTensor) {
  const g = shape.blocks * shape.copies;
  const all = offsetsOf(r, g, shape.groups, most);
  const ranks = Array.from({ length: g }, (_, own) => ref.row_tables(all, { ...shape, own }));
  const part = (i: number) => ranks.map((tables) => r.of(tables[i]!.shape, [...tables[i]!.data], "u32"));
  const [splits, from, back] = [part(1), part(2), part(3)];
  const rows = reverse ? shape.rows : shape.sends;
  const kinds = { kind: "all_to_all", backward_kind: "all_to_all" };
  const how = {
    group: "ep", algorithm: "direct", ranks: ranks.map((_, i) => i), ...kinds, blocks: shape.blocks,
    copies: shape.copies, sends: shape.sends,
  };
  return [
    how, ...(reverse ? [...back, ...from] : [...from, ...back]), ...splits, ...ranks.map(() => draw(rows)),
  ];
}

const sent: Sample[] = cases.flatMap(([name, shape, most], i) => [false, true].map((reverse) => ({
  name: `${name}, ${reverse ? "on the way back" : "there"}`,
  args: (r: Draw) => exchange(r, shape, most, reverse, (rows) => r.normal([rows, i % 2 ? 13 : 20])),
})));

export default [
  opSamples({
    op: row_tables, reference: ref.row_tables,
    samples: cases.flatMap(([name, shape, most]) => [0, shape.blocks * shape.copies - 1].map((own) => ({
      name: `${name}, rank ${own}`,
      args: (r: Draw) => [
        offsetsOf(r, shape.blocks * shape.copies, shape.groups, most), { ...shape, own, limit: 30 },
      ],
    }))),
    errors: [
      {
        name: "offsets of fewer groups", message: /row_tables.*all must be \[senders, above 6\].*\[2, 6\]/,
        args: (r) => [offsetsOf(r, 2, 4, 1), { ...cases[0]![1], own: 0 }],
      },
      {
        name: "groups that do not divide",
        message: /row_tables.*groups must be a multiple of 2 blocks, found 5/,
        args: (r) => [offsetsOf(r, 2, 5, 1), { ...cases[0]![1], groups: 5, own: 0 }],
      },
      {
        name: "another number of senders", message: /row_tables.*all must be \[2, W\].*\[3, 8\]/,
        args: (r) => [offsetsOf(r, 3, 6, 1), { ...cases[0]![1], own: 0 }],
      },
    ],
  }),
  opSamples({
    op: limit_offsets, reference: ref.limit_offsets,
    samples: [
      { name: "enough", args: (r) => [r.of([4], [0, 2, 2, 9], "u32"), 9] },
      { name: "too many", args: (r) => [r.of([5], [0, 2, 7, 9, 20], "u32"), 8] },
      {
        name: "many groups",
        args: (r) => [r.of([200], Array.from({ length: 200 }, (_, i) => 3 * i), "u32"), 99],
      },
    ],
    errors: [{
      name: "a matrix", args: (r) => [r.of([1, 2], [0, 1], "u32"), 3],
      message: /limit_offsets.*offsets must be \[groups \+ 1\].*\[1, 2\]/,
    }],
  }),
  opSamples({
    op: exchange_rows, reference: ref.exchange_rows, vjp: ref.exchange_rows_vjp,
    samples: [
      ...sent,
      {
        name: "more ranks than a launch takes",
        args: (r) => exchange(r, { groups: 8, blocks: 4, copies: 2, rows: 64, sends: 32 }, 4, true,
          (rows) => r.normal([rows, 8])),
      },
      {
        name: "more senders than a launch takes",
        args: (r) => exchange(r, { groups: 16, blocks: 8, copies: 1, rows: 80, sends: 64 }, 4, false,
          (rows) => r.normal([rows, 140])),
      },
      {
        name: "whole numbers",
        args: (r) => {
          const [how, ...rest] = exchange(r, { groups: 14, blocks: 7, copies: 1, rows: 40, sends: 28 }, 2,
            false, (rows) => r.integers([rows, 3], 0, 99, "u32"));
          return [{ ...how as object, integers: true }, ...rest];
        },
      },
      {
        name: "whole numbers in fours",
        args: (r) => {
          const [how, ...rest] = exchange(r, cases[1]![1], 4, false,
            (rows) => r.integers([rows, 4], 0, 99, "u32"));
          return [{ ...how as object, integers: true }, ...rest];
        },
      },
      {
        name: "no columns",
        args: (r) => exchange(r, cases[0]![1], 4, false, (rows) => r.normal([rows, 0])),
      },
    ],
    errors: [
      {
        name: "a tensor too few", message: /exchange_rows.*tensors must be 4 for each of 2 ranks, found 7/,
        args: (r) => exchange(r, cases[0]![1], 1, false, (rows) => r.normal([rows, 4])).slice(0, -1),
      },
      {
        name: "a way back of other rows", message: /exchange_rows.*back must be \[23, m\].*\[24, 1\]/,
        args: (r) => exchange(r, cases[0]![1], 1, false, (rows) => r.normal([rows - 1, 4])),
      },
    ],
  }),
];
