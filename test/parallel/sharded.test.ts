import { afterAll, describe, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { recompute } from "../../src/autograd/recompute.ts";
import {
  communicationObservers, copyToGroup, type Communication, gatherFromGroup, type Group, sumOverGroup,
} from "../../src/ops/collectives.ts";
import { add, scale, split_columns } from "../../src/ops/elementwise.ts";
import { linear } from "../../src/ops/linear.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import { localsOf, perRank, Sharded } from "../../src/tensor/sharded.ts";
import { testAdapters } from "../support/adapters.ts";

const PAIR: Group = { name: "tp", members: [[0, 1]], algorithm: "direct" };
const PAIRS: Group = { name: "tp", members: [[0, 2], [1, 3]], algorithm: "direct" };

for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());
    const values = async (x: unknown) => Promise.all(
      localsOf(x as Sharded).map(async (local) => Array.from(await local.read())));
    const on = (...rows: number[][]) => new Sharded(rows.map((row) => device.tensor(row, [row.length])));

    test("an op runs once per rank, on values inside of options and lists too", async () => {
      const x = on([1, 2], [3, 4]);
      expect(await values(add(x, scale(x, 2)))).toEqual([[3, 6], [9, 12]]);
      expect(await values(scale(x, perRank([10, 100])))).toEqual([[10, 20], [300, 400]]);
      const [, right] = split_columns(x.reshape([1, 2]), [1, 1]);
      expect(await values(right)).toEqual([[2], [4]]);
      const product = linear(x.reshape([1, 2]), on([1, 0, 1, 1], [2, 0, 0, 2]).reshape([2, 2]), null);
      expect(await values(product)).toEqual([[1, 3], [6, 8]]);
    });

    test("gradients pass through collectives, and nothing stays alive", async () => {
      const before = device.pool.liveBytes;
      const [a, b] = [device.tensor([1, 2], [2]), device.tensor([3, 4], [2])];
      for (const leaf of [a, b]) leaf.requiresGrad = true;
      const tape = new Tape();
      const gradients = scope(() => {
        const x = new Sharded([a, b]);
        const y = tape.run(() => recompute([x], () => {
          const both = sumOverGroup(scale(copyToGroup(x, PAIR), perRank([2, 5])), PAIR);
          return [gatherFromGroup(both, PAIR, 0, true)];
        })[0]!);
        const seeds = [device.tensor([1, 1, 1, 1], [4]), device.tensor([10, 10, 20, 20], [4])];
        return tape.backward(localsOf(y), seeds);
      });
      // Rank 0 gathers [s, s'] of both; what it is weighed with sums over ranks, then over copies of x.
      expect(await values(gradients.get(a.key))).toEqual([[11 * 2 + 21 * 5, 11 * 2 + 21 * 5]]);
      expect(await values(gradients.get(b.key))).toEqual([[11 * 2 + 21 * 5, 11 * 2 + 21 * 5]]);
      for (const tensor of [a, b, ...gradients.values()]) tensor.release();
      expect(device.pool.liveBytes).toBe(before);
    });

    test("every group communicates for itself, and is seen doing so", async () => {
      const seen: Communication[] = [];
      const observer = (communication: Communication) => seen.push(communication);
      communicationObservers.add(observer);
      try {
        expect(await values(sumOverGroup(on([1], [2], [3], [4]), PAIRS))).toEqual([[4], [6], [4], [6]]);
      } finally {
        communicationObservers.delete(observer);
      }
      expect(seen).toEqual([[0, 2], [1, 3]].map((ranks) => ({
        kind: "all_reduce", group: "tp", algorithm: "direct", ranks, sent: [4, 4], bytes: 8, backward: false,
      })));
    });

    test("refuses memory of its own and ranks that differ", () => {
      const x = on([1], [2]);
      expect(() => x.storage).toThrow(/no memory of its own/);
      expect(() => on([1], [2, 3])).toThrow(/must agree: expected f32 \[1\], found f32 \[2\]/);
      expect(() => new Sharded([])).toThrow(/at least one local tensor, found none/);
      expect(() => x.copyFrom(on([1], [2], [3]))).toThrow(/a value on 2 ranks, found 3/);
    });
  });
}
