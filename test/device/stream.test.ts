import { describe, expect, test } from "vitest";
import { GpuError, OutOfMemoryError } from "../../src/gpu/errors.ts";
import { accumulate, add, relu2, scale } from "../../src/ops/elementwise.ts";
import { embedding } from "../../src/ops/embedding.ts";
import type { Device } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { Draw } from "../ops/suite.ts";
import { onEveryAdapter } from "../support/devices.ts";

const SIZE = 8;

/** Random writes, copies, clears and dispatches on some tensors, and what they must hold afterwards. */
function program(r: Draw, steps: number, cells: number) {
  const expected = Array.from({ length: cells }, () => new Float32Array(SIZE));
  const commands = Array.from({ length: steps }, () => {
    const below = (n: number) => Math.floor(n * r.next());
    const [kind, from, to] = [below(4), below(cells), below(cells)];
    const [source, target] = [expected[from]!, expected[to]!];
    const values = Float32Array.from({ length: SIZE }, () => Math.floor(10 * r.next()));
    if (kind === 0) target.set(values);
    else if (kind === 1) target.fill(0);
    else if (kind === 2) target.set(source);
    else if (from !== to) target.forEach((x, i) => (target[i] = (x + source[i]!) % 2 ** 24));
    return { kind, from, to, values };
  });
  const run = (tensors: readonly Tensor[]) => {
    for (const { kind, from, to, values } of commands) {
      const [source, target] = [tensors[from]!, tensors[to]!];
      if (kind === 0) target.write(values);
      else if (kind === 1) target.clear();
      else if (kind === 2 && from !== to) target.copyFrom(source);
      else if (kind === 3 && from !== to) accumulate(target, source);
    }
  };
  return { run, expected };
}

const zeros = (device: Device, count: number) => Array.from({ length: count }, () => device.zeros([SIZE]));
const read = (tensors: readonly Tensor[]) => Promise.all(tensors.map((tensor) => tensor.read()));
const freeAll = (tensors: readonly Tensor[]) => tensors.forEach((tensor) => tensor.dispose());

await onEveryAdapter((device, open) => {
  describe("order", () => {
    test("writes, copies, clears and dispatches take effect in the order they were recorded", async () => {
      const fresh = await open(); // the first batches wait for a pipeline
      for (const seed of [1, 2, 3]) {
        const { run, expected } = program(new Draw(seed), 150, 4);
        const tensors = zeros(fresh, 4);
        run(tensors);
        expect(await read(tensors), `seed ${seed}`).toEqual(expected);
        freeAll(tensors);
      }
    });

    test("a replay takes its place between what is recorded before and after it", async () => {
      const fresh = await open();
      const [x, y] = zeros(fresh, 2) as [Tensor, Tensor];
      const { graph } = fresh.capture(() => accumulate(y, x));
      const expected = new Float32Array(SIZE);
      for (let i = 1; i <= 40; i++) {
        x.write(new Float32Array(SIZE).fill(i));
        fresh.replay(graph);
        expected.forEach((value, j) => (expected[j] = value + i));
        if (i % 7 === 0) {
          scope(() => y.copyFrom(scale(y, 0.5)));
          expected.forEach((value, j) => (expected[j] = value / 2));
        }
      }
      expect(await y.read()).toEqual(expected);
      fresh.stream.disposeGraph(graph);
    });

    test("what is freed may be used again at once without disturbing what was recorded before", async () => {
      const total = device.zeros([SIZE]);
      for (let i = 0; i < 30; i++) {
        scope(() => accumulate(total, device.tensor(new Float32Array(SIZE).fill(i), [SIZE])));
      }
      expect((await total.read())[0]).toBe(435);
      total.dispose();
    });
  });

  describe("capture and replay", () => {
    test("a capture runs nothing, a replay gives the same bits as the step itself", async () => {
      const r = new Draw(5);
      const { run, expected } = program(r, 90, 4);
      const tensors = zeros(device, 4);
      const { graph } = device.capture(() => run(tensors));
      expect(await read(tensors)).toEqual(tensors.map(() => new Float32Array(SIZE)));
      device.replay(graph);
      expect(await read(tensors)).toEqual(expected);
      device.stream.disposeGraph(graph);
      freeAll(tensors);
    });

    test("in the steady state nothing is created", async () => {
      const x = device.zeros([1000]);
      const y = device.zeros([1000]);
      const { graph } = device.capture(() => scope(() => y.copyFrom(add(relu2(scale(x, 3)), x))));
      const step = async (value: number) => {
        x.write(new Float32Array(1000).fill(value));
        device.replay(graph);
        return (await y.read())[999]!;
      };
      expect(await step(1)).toBe(10);
      const { created, heldBytes, liveBytes } = device.pool;
      const groups = device.bindGroupsCreated;
      for (let i = 2; i < 20; i++) expect(await step(i)).toBe(9 * i * i + i);
      expect(device.pool).toMatchObject({ created, heldBytes, liveBytes });
      expect(device.bindGroupsCreated).toBe(groups);
      device.stream.disposeGraph(graph);
      freeAll([x, y]);
    });

    test("so it is without a capture, when the same shapes come again", async () => {
      const x = device.tensor(new Float32Array(100).fill(2), [100]);
      const step = () => scope(() => scale(add(relu2(x), x), 0.5)).dispose();
      for (let i = 0; i < 10; i++) step(); // buffers change places, until every arrangement has been seen
      const { created } = device.pool;
      const groups = device.bindGroupsCreated;
      for (let i = 0; i < 10; i++) step();
      expect([device.pool.created, device.bindGroupsCreated]).toEqual([created, groups]);
      x.dispose();
    });

    test("two graphs share no memory, and what a graph frees is not given to others", async () => {
      const x = device.tensor(new Float32Array(SIZE).fill(1), [SIZE]);
      const make = (factor: number) => device.capture(() => scope(() => scale(add(x, x), factor)));
      const [one, two] = [make(2), make(3)];
      const ids = [one, two].map(({ graph }) => graph.arena.physicals.map(({ id }) => id));
      expect(ids[0]!.filter((id) => ids[1]!.includes(id))).toEqual([]);
      const outside = scope(() => [0, 1, 2, 3].map(() => add(x, x)));
      expect(outside.filter(({ storage }) => ids.flat().includes(storage.id))).toEqual([]);
      for (const { graph } of [one, two]) device.replay(graph);
      expect((await read([one.result, two.result])).map((values) => values[0])).toEqual([4, 6]);
      for (const { graph } of [one, two]) device.stream.disposeGraph(graph);
      freeAll([...outside, x, one.result, two.result]); // a result may be let go before or after its graph
    });

    test("tensors of a graph share memory where their lives allow it, and nowhere else", async () => {
      const draw = new Draw(3);
      const zero = device.zeros([656], "i32");
      for (let program = 0; program < 6; program++) {
        const x = device.tensor(new Float32Array(64).fill(1), [64]);
        const steps = Array.from({ length: 80 }, () => ({
          from: draw.next(), size: 16 + 16 * Math.floor(40 * draw.next()), drop: draw.next(),
            factor: 1 + draw.next() / 9,
        }));
        const run = () => {
          const alive: { tensor: Tensor; value: number }[] = [];
          for (const { from, size, drop, factor } of steps) {
            const source = alive[Math.floor(from * alive.length)];
            const tensor = scope(() => {
              const first = (source?.tensor ?? x).reshape([-1, 1]);
              return scale(embedding(zero.prefix([size]), first), factor);
            });
            alive.push({ tensor, value: (source?.value ?? 1) * factor });
            if (drop < 0.7) alive.splice(Math.floor(drop * alive.length), 1)[0]!.tensor.dispose();
          }
          return alive;
        };
        const { graph, result } = device.capture(run);
        for (let i = 0; i < 2; i++) device.replay(graph);
        for (const { tensor, value } of result) {
          const values = Array.from(await tensor.read());
          expect(Math.max(...values.map((found) => Math.abs(found / value - 1)))).toBeLessThan(1e-5);
        }
        const { peak, live, total, buffers, tensors } = graph.memory;
        expect(tensors).toBe(160);
        expect(buffers).toBeLessThan(tensors);
        expect(peak).toBeGreaterThanOrEqual(live);
        expect(peak).toBeLessThan(1.4 * live); // sizes at random are harder than those of a model
        expect(total).toBeGreaterThan(live);
        for (const { tensor } of result) tensor.dispose();
        device.stream.disposeGraph(graph);
        x.dispose();
      }
      zero.dispose();
    });

    test("a capture whose memory does not fit is undone", () => {
      const { pool } = device;
      pool.trim();
      const { liveBytes, heldBytes } = pool;
      pool.ceilingBytes = heldBytes + 1000;
      const capture = () => device.capture(() => scope(() => [device.zeros([100]), device.zeros([200])]));
      expect(capture).toThrow(OutOfMemoryError);
      pool.ceilingBytes = Infinity;
      expect(pool).toMatchObject({ liveBytes, heldBytes });
      const { graph, result } = capture();
      freeAll(result);
      device.stream.disposeGraph(graph);
    });

    test("disposing of a graph gives its memory back, and it cannot be replayed", async () => {
      const x = device.zeros([100_000]);
      const before = { live: device.pool.liveBytes, held: device.pool.heldBytes };
      const { graph } = device.capture(() => scope(() => scale(add(x, x), 2)));
      expect(device.pool.heldBytes).toBeGreaterThan(before.held);
      device.replay(graph);
      device.stream.disposeGraph(graph);
      device.stream.disposeGraph(graph); // a second time is no harm
      expect({ live: device.pool.liveBytes, held: device.pool.heldBytes }).toEqual(before);
      expect(() => device.replay(graph)).toThrow(GpuError);
      await device.finish();
      x.dispose();
    });

    test("a graph keeps the tensors it uses, also those freed during its capture", async () => {
      const y = device.zeros([SIZE]);
      let x = device.tensor(new Float32Array(SIZE).fill(7), [SIZE]);
      const { graph } = device.capture(() => {
        y.copyFrom(x);
        x.dispose();
      });
      const others = [1, 2, 3].map((value) => device.tensor(new Float32Array(SIZE).fill(value), [SIZE]));
      device.replay(graph);
      expect((await y.read())[0]).toBe(7);
      const live = device.pool.liveBytes;
      device.stream.disposeGraph(graph);
      expect(device.pool.liveBytes).toBe(live - 256);
      x = device.zeros([SIZE]);
      freeAll([x, y, ...others]);
    });

    test("a graph disposed of while its replay waits for a pipeline still runs as captured", async () => {
      const fresh = await open();
      const [x, y, z] = zeros(fresh, 3) as [Tensor, Tensor, Tensor];
      x.write(new Float32Array(SIZE).fill(1));
      const { graph } = fresh.capture(() => scope(() => y.copyFrom(scale(x, 2))));
      fresh.replay(graph);
      fresh.stream.disposeGraph(graph);
      const next = fresh.capture(() => scope(() => z.copyFrom(scale(x, 3)))).graph;
      fresh.replay(next);
      expect((await read([y, z])).map((values) => values[0])).toEqual([2, 3]);
    });

    test("a capture that throws leaves nothing behind", async () => {
      const x = device.tensor(new Float32Array(SIZE).fill(1), [SIZE]);
      const { liveBytes, heldBytes } = device.pool;
      expect(() => device.capture(() => scope(() => {
        add(x, x);
        throw new Error("from inside");
      }))).toThrow("from inside");
      expect(device.pool).toMatchObject({ liveBytes, heldBytes });
      expect((await x.read())[0]).toBe(1);
      x.dispose();
    });

    test("captures do not nest, and within one nothing is replayed or read", async () => {
      const x = device.tensor(new Float32Array(SIZE).fill(1), [SIZE]);
      const { graph } = device.capture(() => scope(() => add(x, x)));
      let reading: Promise<unknown> = Promise.resolve();
      const outer = device.capture(() => {
        expect(() => device.capture(() => {})).toThrow(/already in progress/);
        expect(() => device.replay(graph)).toThrow(GpuError);
        reading = x.read().catch((error: unknown) => error);
        return scope(() => scale(x, 5));
      });
      expect(await reading).toBeInstanceOf(GpuError);
      device.replay(outer.graph);
      expect((await outer.result.read())[0]).toBe(5);
      for (const each of [graph, outer.graph]) device.stream.disposeGraph(each);
      freeAll([x, outer.result]);
      expect(device.pool.liveBytes).toBe(0);
    });
  });
}, "own");
