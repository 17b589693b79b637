import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { checkLayout, parseLayout } from "../../src/parallel/layout.ts";
import {
  bubbleFraction, interleave, liveMicroBatches, overlapBlocks, overlapOrder, scheduleOf, simulate,
  virtualSteps,
} from "../../src/parallel/schedule.ts";
import type { Action, OverlapNode, PipelineSchedule, RankAction } from "../../src/parallel/schedule.ts";
import { preset } from "../../src/models/presets.ts";
import { UsageError } from "../../src/tensor/errors.ts";

const schedule = (pp: number, vpp: number, micros: number, group = pp, overlap = false) =>
  scheduleOf({ pp, vpp, micro_batch_group: group, overlap }, micros);
/** "F0 B0", and with several chunks "F0.1": micro-batch and chunk. */
const show = (actions: readonly Action[], chunks = false) => actions.map(({ kind, micro, chunk }) =>
  `${kind === "forward" ? "F" : "B"}${micro}${chunks ? `.${chunk}` : ""}`).join(" ");
/** Forward passes before the first backward pass. */
const warmup = (actions: readonly Action[]) => actions.findIndex(({ kind }) => kind === "backward") - 1;

/** Sizes that the rules of interleaving allow: pp, vpp, micro-batches, group. */
const INTERLEAVED = fc.tuple(
  fc.integer({ min: 2, max: 4 }), fc.integer({ min: 2, max: 4 }), fc.integer({ min: 0, max: 3 }),
  fc.integer({ min: 1, max: 3 }), fc.nat(12),
).map(([pp, vpp, more, groups, rest]): [number, number, number, number] => {
  const group = pp + more;
  const last = rest % group >= pp ? rest % group : 0;
  return [pp, vpp, groups * group + last, group];
});

describe("1F1B", () => {
  test("has the published order", () => {
    expect(schedule(4, 1, 5).ranks.map((actions) => show(actions))).toEqual([
      "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4",
      "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
      "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
      "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]);
    expect(schedule(1, 1, 2).ranks.map((actions) => show(actions))).toEqual(["F0 B0 F1 B1"]);
  });

  test("warms up with min(P - p - 1, M) passes and keeps min(M, P - p) micro-batches alive", () => {
    for (let pp = 1; pp <= 6; pp++) {
      for (let micros = 1; micros <= 8; micros++) {
        const found = schedule(pp, 1, micros);
        expect(found.ranks.map(warmup)).toEqual(
          found.ranks.map((_, p) => Math.min(pp - p - 1, micros - 1)));
        expect(liveMicroBatches(found)).toEqual(found.ranks.map((_, p) => Math.min(micros, pp - p)));
        expect(bubbleFraction(found)).toBeCloseTo((pp - 1) / micros, 12);
      }
    }
  });
});

describe("interleaved 1F1B", () => {
  test("has the published table and warm-up", () => {
    expect(virtualSteps(2, 4, 2).map(({ micro, chunk }) => [micro, chunk])).toEqual(
      [[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [3, 0], [2, 1], [3, 1]]);
    const found = schedule(2, 2, 4);
    expect(found.ranks.map((actions) => show(actions, true))).toEqual([
      "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0",
      "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0",
    ]);
    expect(found.ranks.map(warmup)).toEqual([4, 2]);
  });

  test("an uneven last group is shorter", () => {
    expect(virtualSteps(2, 6, 4).map(({ micro, chunk }) => `${micro}.${chunk}`).join(" ")).toBe(
      "0.0 1.0 2.0 3.0 0.1 1.1 2.1 3.1 4.0 5.0 4.1 5.1");
    expect(schedule(2, 2, 6, 4).ranks.map(warmup)).toEqual([6, 4]);
    expect(schedule(2, 2, 5, 3).ranks.map((actions) => show(actions, true))[1]).toBe(
      "F0.0 F1.0 F2.0 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.0 B0.0 F4.0 B1.0 F3.1 B2.0 F4.1 B3.1 B4.1 B3.0 B4.0");
  });

  test("warms up with 2 (P - p - 1) + (V - 1) N passes, never deadlocks, and ends in time", () => {
    fc.assert(fc.property(INTERLEAVED, ([pp, vpp, micros, group]) => {
      const found = schedule(pp, vpp, micros, group);
      found.ranks.forEach((actions, p) => {
        const expected = Math.min(2 * (pp - p - 1) + (vpp - 1) * group, micros * vpp);
        expect(warmup(actions)).toBe(Math.min(expected, micros * vpp - 1));
      });
      checkOrder(found, interleave(found));
      if (group === pp) expect(bubbleFraction(found)).toBeCloseTo((pp - 1) / (micros * vpp), 12);
    }), { numRuns: 200, seed: 6 });
  });

  test.each([
    [2, 2, 4, 1, "has at least pp micro-batches\": expected group >= 2, found 1."],
    [2, 2, 4, 6, "has at most all micro-batches\": expected group <= 4, found 6."],
    [3, 2, 8, 3, "micro_batches mod 3 to be 0 or at least 3, found 8 mod 3 = 2."],
    [64, 2, 2 ** 14, 64, "limits\": expected at most 1048576 passes forward, found 16384 * 64 * 2."],
    [1, 1, 0, 1, "\"micro_batches is a count\": expected a whole number above 0, found 0."],
    [2, 1, 1.5, 1, "\"micro_batches is a count\": expected a whole number above 0, found 1.5."],
  ])("%d x %d stages, %d micro-batches in groups of %d are refused", (pp, vpp, micros, group, message) => {
    expect(() => schedule(pp, vpp, micros, group)).toThrow(UsageError);
    expect(() => schedule(pp, vpp, micros, group)).toThrow(message);
  });
});

/** Every pass once, in the order of its rank, after the passes whose results it takes. */
function checkOrder(
  { pp, vpp, micro_batches: micros, ranks }: PipelineSchedule, order: readonly RankAction[],
): void {
  const at = new Map(order.map(({ rank, kind, micro, chunk }, i) =>
    [`${kind} ${chunk * pp + rank} ${micro}`, i]));
  expect(at.size).toBe(2 * pp * vpp * micros);
  expect(order).toHaveLength(at.size);
  ranks.forEach((actions, rank) =>
    expect(order.filter((action) => action.rank === rank)).toEqual(
      actions.map((action) => ({ rank, ...action }))));
  for (let micro = 0; micro < micros; micro++) {
    const chain = Array.from({ length: pp * vpp }, (_, stage) => at.get(`forward ${stage} ${micro}`)!);
    chain.push(...chain.map((_, stage) => at.get(`backward ${stage} ${micro}`)!).reverse());
    expect([...chain].sort((a, b) => a - b)).toEqual(chain);
  }
}

describe("one order for one controller", () => {
  test("what can begin at the same time stands together", () => {
    expect(interleave(schedule(2, 1, 2)).map((action) => `${action.rank}:${show([action])}`).join(" "))
      .toBe("0:F0 0:F1 1:F0 1:B0 0:B0 1:F1 1:B1 0:B1");
    for (const [pp, micros] of [[1, 3], [3, 2], [4, 9]] as const) {
      const found = schedule(pp, 1, micros);
      checkOrder(found, interleave(found));
    }
  });

  test("passes begin when their rank and what they need is there", () => {
    const [first, ...others] = simulate(schedule(2, 1, 2), { forward: 1, backward: 2 });
    expect(first).toEqual({ rank: 0, kind: "forward", micro: 0, chunk: 0, start: 0 });
    expect(others.map(({ rank, start, ...action }) => `${rank}:${show([action])}@${start}`).join(" "))
      .toBe("0:F1@1 1:F0@1 1:B0@2 0:B0@4 1:F1@4 1:B1@5 0:B1@7");
  });

  test("a schedule that stops is refused with what waits for what", () => {
    const good = schedule(2, 1, 2);
    const [first, second] = good.ranks;
    const wrong = { ...good, ranks: [first!, second!.toReversed()] };
    expect(() => interleave(wrong)).toThrow(UsageError);
    expect(() => interleave(wrong)).toThrow(
      "The schedule stops after 2 of 8 passes: rank 0 waits with the backward pass of micro-batch 0 in chunk "
      + "0 for the backward pass of micro-batch 0 in stage 1.");
  });

  test.each<[string, (ranks: readonly (readonly Action[])[]) => readonly (readonly Action[])[], string]>([
    ["a rank too few", (ranks) => ranks.slice(1), "a list of actions for each rank: expected 2, found 1."],
    ["a pass too few", ([a, b]) => [a!.slice(1), b!], "Rank 0 of the schedule: expected 4 passes, found 3."],
    ["a pass twice", ([a, b]) => [[...a!, a![0]!], b!],
      "Rank 0 of the schedule does the forward pass of micro-batch 0 in chunk 0 once, found it twice."],
    ["a chunk too many", ([a, b]) => [a!, b!.with(0, { kind: "forward", micro: 0, chunk: 1 })],
      "Rank 1 of the schedule: expected micro-batches below 2 and chunks below 1, found the forward pass of "
      + "micro-batch 0 in chunk 1."],
  ])("%s is refused", (_, change, message) => {
    const good = schedule(2, 1, 2);
    expect(() => interleave({ ...good, ranks: change(good.ranks) })).toThrow(message);
  });
});

describe("two passes at once", () => {
  test("one stage: forward of the next micro-batch beside each backward pass", () => {
    const found = schedule(1, 1, 3, 1, true);
    expect(found.ranks.map((actions) => show(actions))).toEqual(["F0 F1 B0 F2 B1 B2"]);
    expect(found.ranks[0]!.map(({ pair }) => pair)).toEqual([undefined, 0, 0, 1, 1, undefined]);
    expect(interleave(found)).toEqual(found.ranks[0]!.map((action) => ({ rank: 0, ...action })));
    expect(show(schedule(1, 1, 1, 1, true).ranks[0]!)).toBe("F0 B0");
  });

  test("interleaved: one pass of warm-up more, pairs that need nothing of each other, no deadlock", () => {
    fc.assert(fc.property(INTERLEAVED, ([pp, vpp, micros, group]) => {
      const found = schedule(pp, vpp, micros, group, true);
      found.ranks.forEach((actions, p) => {
        const expected = Math.min(2 * (pp - p - 1) + (vpp - 1) * group + 1, micros * vpp);
        const paired = actions.filter(({ pair }) => pair !== undefined);
        const first = actions.findIndex(({ pair, kind }) => pair !== undefined || kind === "backward");
        expect(first).toBe(expected);
        expect(paired).toHaveLength(2 * (micros * vpp - expected));
        for (let i = 0; i < paired.length; i += 2) {
          expect(paired[i]!.pair).toBe(paired[i + 1]!.pair);
          expect([paired[i]!.kind, paired[i + 1]!.kind]).toEqual(["forward", "backward"]);
        }
      });
      const order = interleave(found);
      checkOrder(found, order);
      order.forEach(({ pair, rank, kind }, i) => {
        if (pair === undefined || kind === "backward") return;
        expect(order[i + 1]).toMatchObject({ pair, rank, kind: "backward" });
      });
    }), { numRuns: 200, seed: 7 });
  });

  test("a pipeline without chunks is refused", () => {
    expect(() => schedule(2, 1, 4, 2, true)).toThrow(
      "\"paired passes need interleaving or one stage\": expected vpp above 1, found vpp=1 with pp=2.");
  });

  test("layers are cut behind each layer of experts", () => {
    expect(overlapBlocks("M*EM-E*M")).toEqual([
      { layers: [0, 3], experts: true }, { layers: [3, 6], experts: true },
      { layers: [6, 8], experts: false },
    ]);
    expect(overlapBlocks("ME")).toEqual([{ layers: [0, 2], experts: true }]);
    expect(overlapBlocks("")).toEqual([]);
  });

  const name = (node: OverlapNode | null) => node ? `${node.kind[0]}${node.block}:${node.node}` : "-";

  test("each exchange has the other pass's computation beside it", () => {
    const blocks = overlapBlocks("MEME");
    const order = overlapOrder(blocks, blocks).map(({ comm, compute }) => [name(comm), name(compute)]);
    expect(order).toEqual([0, 1].flatMap((f) => [1 - f].flatMap((b) => [
      [`b${b}:combine`, `f${f}:before`], [`f${f}:dispatch`, `b${b}:experts`],
      [`b${b}:dispatch`, `b${b}:experts_weights`], ["-", `f${f}:experts`],
      [`f${f}:combine`, `b${b}:before`], ["-", `b${b}:before_weights`],
    ])));
  });

  test.each([["MEME*", "MEME*"], ["EEE", "M"], ["M-", "ME-E"], ["", "ME"], ["MEM", ""]])(
    "%s beside %s: every node once, after what it needs", (one, other) => {
      const [forward, backward] = [overlapBlocks(one), overlapBlocks(other)];
      const slots = overlapOrder(forward, backward);
      const at = new Map<string, number>();
      slots.forEach(({ comm, compute }, i) => {
        for (const node of [comm, compute]) {
          if (!node) continue;
          expect(at.has(name(node))).toBe(false);
          at.set(name(node), i);
        }
        if (comm && compute) expect([comm.kind, comm.node]).not.toEqual([compute.kind, compute.node]);
      });
      const chain = (blocks: typeof forward, kind: string, nodes: readonly string[], reverse: boolean) => {
        const names = blocks.map((block, i) => nodes
          .filter((node) => block.experts || node.startsWith("before")).map((node) => `${kind}${i}:${node}`));
        const list = (reverse ? names.reverse() : names).flat();
        const places = list.map((each) => at.get(each)!);
        expect(places).not.toContain(undefined);
        expect(places.every((place, i) => i === 0 || place > places[i - 1]!)).toBe(true);
        return list.length;
      };
      const count = chain(forward, "f", ["before", "dispatch", "experts", "combine"], false)
        + chain(backward, "b", ["combine", "experts", "dispatch", "before"], true)
        + backward.reduce((sum, { experts }) => sum + (experts ? 2 : 1), 0);
      expect(at.size).toBe(count);
      backward.forEach(({ experts }, i) => {
        expect(at.get(`b${i}:before_weights`)).toBeGreaterThan(at.get(`b${i}:before`)!);
        if (experts) expect(at.get(`b${i}:experts_weights`)).toBeGreaterThan(at.get(`b${i}:experts`)!);
      });
    });
});

test("a layout's step and its schedule refuse the same", () => {
  const layout = parseLayout("pp=2,vpp=2,group=3");
  for (let micros = 1; micros < 12; micros++) {
    const says = (body: () => unknown) => {
      try {
        body();
        return null;
      } catch (error) {
        return String(error);
      }
    };
    const sizes = { batch: 1, seqlen: 4, micro_batches: micros };
    expect(says(() => checkLayout(layout, preset("unit"), sizes)), String(micros))
      .toBe(says(() => scheduleOf(layout, micros)));
  }
});
