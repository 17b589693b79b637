import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  attentionGrid, checkPipelines, coordinatesOf, expertGrid, GROUP_KINDS, gridGroups, groupsOf, rankAt,
  ranksPerStage, stageGroups, stageRanks, STAGE_GROUP_KINDS, worldOf,
} from "../../src/parallel/mesh.ts";
import type { GroupKind, MeshSizes } from "../../src/parallel/mesh.ts";

const mesh = (sizes: Partial<MeshSizes>): MeshSizes =>
  ({ tp: 1, cp: 1, dp: 1, pp: 1, etp: 1, ep: 1, edp: 1, ...sizes });
/** "0 1|2 3" is [[0, 1], [2, 3]], and 0-3 is 0 1 2 3. */
const lists = (text: string): number[][] => text.split("|").map((group) =>
  group.trim().split(/\s+/).flatMap((part) => {
    const [from, to] = part.split("-").map(Number);
    return Array.from({ length: (to ?? from!) - from! + 1 }, (_, i) => from! + i);
  }));
const pairs = (count: number) => Array.from({ length: count / 2 }, (_, i) => [2 * i, 2 * i + 1]);
const singles = (count: number) => Array.from({ length: count }, (_, i) => [i]);

/** Factorizations of up to 3^5 ranks per stage into both grids, each drawn apart, in up to 4 stages. */
const MESHES = fc.tuple(
  fc.array(fc.tuple(fc.constantFrom(2, 3), fc.nat(2), fc.nat(2)), { maxLength: 5 }),
  fc.integer({ min: 1, max: 4 }),
).map(([primes, pp]): MeshSizes => {
  const split = (which: 1 | 2) => [0, 1, 2].map((part) =>
    primes.reduce((product, prime) => (prime[which] === part ? product * prime[0] : product), 1));
  const [[tp, cp, dp], [etp, ep, edp]] = [split(1), split(2)];
  return { tp: tp!, cp: cp!, dp: dp!, pp, etp: etp!, ep: ep!, edp: edp! };
});

const W8 = { tp: 2, cp: 2, dp: 2 };
const W16 = { tp: 2, cp: 2, dp: 2, pp: 2 };
const DP16 = "0 4|1 5|2 6|3 7|8 12|9 13|10 14|11 15";
const TABLES: [string, Partial<MeshSizes>, Partial<Record<GroupKind, number[][]>>][] = [
  ["8 ranks, experts over 4", { ...W8, ep: 4, edp: 2 }, {
    "tp": pairs(8), "cp": lists("0 2|1 3|4 6|5 7"), "dp": lists("0 4|1 5|2 6|3 7"),
    "dp-cp": lists("0 2 4 6|1 3 5 7"), "tp-cp": lists("0-3|4-7"), "ep": lists("0-3|4-7"),
    "edp": lists("0 4|1 5|2 6|3 7"), "embedding": singles(8),
  }],
  ["8 ranks, experts over 8", { ...W8, ep: 8 }, { "ep": lists("0-7"), "edp": singles(8) }],
  ["8 ranks, two stages", { tp: 2, dp: 2, pp: 2, ep: 4 }, {
    "tp": pairs(8), "dp": lists("0 2|1 3|4 6|5 7"), "pp": lists("0 4|1 5|2 6|3 7"), "ep": lists("0-3|4-7"),
    "edp": singles(8), "embedding": lists("0 4|1 5|2 6|3 7"), "tp-pp": lists("0 1 4 5|2 3 6 7"),
    "etp-ep-pp": lists("0-7"),
  }],
  ["16 ranks, experts over 4", { ...W16, ep: 4, edp: 2 }, {
    "tp": pairs(16), "cp": lists("0 2|1 3|4 6|5 7|8 10|9 11|12 14|13 15"), "dp": lists(DP16),
    "dp-cp": lists("0 2 4 6|1 3 5 7|8 10 12 14|9 11 13 15"), "tp-dp-cp": lists("0-7|8-15"),
    "pp": lists("0 8|1 9|2 10|3 11|4 12|5 13|6 14|7 15"), "ep": lists("0-3|4-7|8-11|12-15"),
    "edp": lists(DP16),
  }],
  ["16 ranks, experts over 2 x 2", { ...W16, etp: 2, ep: 2, edp: 2 }, {
    "etp": pairs(16), "ep": lists("0 2|1 3|4 6|5 7|8 10|9 11|12 14|13 15"), "edp": lists(DP16),
    "etp-ep": lists("0-3|4-7|8-11|12-15"), "etp-ep-pp": lists("0-3 8-11|4-7 12-15"),
  }],
  ["16 ranks, one stage", { tp: 2, cp: 2, dp: 4, ep: 8, edp: 2 }, {
    "dp": lists("0 4 8 12|1 5 9 13|2 6 10 14|3 7 11 15"), "ep": lists("0-7|8-15"),
    "edp": lists("0 8|1 9|2 10|3 11|4 12|5 13|6 14|7 15"),
  }],
  ["4 stages", { pp: 4 }, { "pp": lists("0-3"), "embedding": lists("0 3") }],
];

describe("groups", () => {
  test.each(TABLES)("%s", (_, sizes, expected) => {
    for (const [kind, groups] of Object.entries(expected)) {
      expect(groupsOf(mesh(sizes), kind as GroupKind), kind).toEqual(groups);
    }
  });

  test("groups of 200 random factorizations are disjoint, cover the world and have their size", () => {
    fc.assert(fc.property(MESHES, (sizes) => {
      const world = worldOf(sizes);
      checkPipelines(attentionGrid(sizes), expertGrid(sizes));
      for (const kind of GROUP_KINDS) {
        const groups = groupsOf(sizes, kind);
        const axes = kind.split("-") as (keyof MeshSizes)[];
        const size = kind === "embedding" ? Math.min(2, sizes.pp)
          : axes.reduce((product, axis) => product * sizes[axis], 1);
        expect(new Set(groups.map((group) => group.length)), kind).toEqual(new Set([size]));
        const members = groups.flat();
        expect(new Set(members).size, kind).toBe(members.length);
        if (kind !== "embedding") expect(members.sort((a, b) => a - b), kind).toEqual(singles(world).flat());
        for (const group of groups) expect([...group].sort((a, b) => a - b), kind).toEqual(group);
      }
    }), { numRuns: 200, seed: 20 });
  });

  test("a stage's groups are those of each stage, counted from its first rank", () => {
    const sizes = mesh({ tp: 2, cp: 2, dp: 3, pp: 3, etp: 2, ep: 3, edp: 2 });
    const count = ranksPerStage(sizes);
    expect(count).toBe(12);
    for (const kind of STAGE_GROUP_KINDS) {
      const local = stageGroups(sizes, kind);
      const expected = [0, 1, 2].flatMap((stage) =>
        local.map((group) => group.map((index) => stageRanks(sizes, stage)[index]!)));
      expect(groupsOf(sizes, kind), kind).toEqual(expected);
    }
  });
});

test("coordinates say where a rank stands in both grids", () => {
  const sizes = mesh({ tp: 2, cp: 3, dp: 2, pp: 2, etp: 1, ep: 4, edp: 3 });
  expect(coordinatesOf(sizes, 21)).toEqual({ tp: 1, cp: 1, dp: 1, pp: 1, etp: 0, ep: 1, edp: 2 });
  for (let rank = 0; rank < worldOf(sizes); rank++) {
    const place = coordinatesOf(sizes, rank);
    expect(rankAt(sizes, place)).toBe(rank);
    expect(groupsOf(sizes, "cp").find((group) => group.includes(rank))![place.cp]).toBe(rank);
    expect(groupsOf(sizes, "ep").find((group) => group.includes(rank))![place.ep]).toBe(rank);
  }
  expect(() => coordinatesOf(sizes, 24)).toThrow("must be from 0 to 23, found 24");
  expect(() => coordinatesOf(sizes, 0.5)).toThrow("must be from 0 to 23, found 0.5");
});

test("grids with other pipelines are refused", () => {
  const attention = attentionGrid(mesh({ tp: 2, dp: 2, pp: 2 }));
  const good = expertGrid(mesh({ ep: 4, pp: 2 }));
  expect(() => checkPipelines(attention, good)).not.toThrow();
  expect(() => checkPipelines(attention, expertGrid(mesh({ ep: 2, pp: 2 }))))
    .toThrow("same ranks: expected 8 (tp = 2, cp = 1, dp = 2, pp = 2), found 4 (etp = 1, ep = 2, edp = 1, ");
  expect(() => checkPipelines(attention, expertGrid(mesh({ ep: 2, pp: 4 }))))
    .toThrow("same pipelines: expected 0-4 of tp = 2");
  // With pp before edp the stages of the two grids are the same only where dp = edp.
  expect(() => checkPipelines([["tp", 2], ["pp", 2], ["dp", 2]], [["ep", 4], ["pp", 2], ["edp", 1]]))
    .toThrow("found 0-4 of ep = 4");
  expect(() => checkPipelines([["tp", 2], ["pp", 2], ["dp", 2]], [["ep", 2], ["pp", 2], ["edp", 2]]))
    .not.toThrow();
});

test("a group runs along axes of its grid", () => {
  expect(() => gridGroups(attentionGrid(mesh({})), ["ep"])).toThrow("tp, cp, dp, pp cannot run along \"ep\"");
});
