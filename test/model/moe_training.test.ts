/** What a training run may ask of an MoE layer: dropping, padding, replay, where weights come in. */
import { describe, expect, test } from "vitest";
import { recompute } from "../../src/autograd/recompute.ts";
import { Tape } from "../../src/autograd/tape.ts";
import type { ForwardContext, Routing } from "../../src/nn/context.ts";
import { MoE, type MoESizes } from "../../src/nn/moe.ts";
import { makeMoETraining, type MoERun, type MoETraining } from "../../src/nn/moe_training.ts";
import { RouterReplay } from "../../src/nn/replay.ts";
import { Weights } from "../../src/nn/weights.ts";
import type { Device } from "../../src/tensor/device.ts";
import { promote, scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { onEveryAdapter } from "../support/devices.ts";
import { Draw } from "../ops/suite.ts";

const [T, D, E, K, F] = [16, 12, 4, 2, 8];
const SIZES: MoESizes = {
  hidden: D, n_routed_experts: E, num_experts_per_tok: K, moe_intermediate_size: F, moe_latent_size: null,
  shared_size: 8, n_group: 1, topk_group: 1, group_best: 2, scoring_func: "sigmoid", router_choice: "score",
  norm_topk_prob: true, routed_scaling_factor: 2, bias: false,
};

/** A layer, its input, and what one pass through it gives. */
class Bench {
  readonly device: Device;
  readonly layer: MoE;
  readonly x: Tensor;
  readonly dy: Tensor;
  readonly parameters: Map<string, Tensor>;

  constructor(device: Device, sizes: Partial<MoESizes> = {}, changes: Record<string, number[]> = {}) {
    const r = new Draw(7);
    const made = new Map<string, Tensor>();
    const all = { ...SIZES, ...sizes };
    const X = all.moe_latent_size ?? D;
    const shapes: [string, number[]][] = [
      ["gate.weight", [E, D]], ["gate.e_score_correction_bias", [E]], ["experts.up_proj", [E, F, X]],
      ["experts.down_proj", [E, X, F]], ["shared_experts.up_proj.weight", [8, D]],
      ["shared_experts.down_proj.weight", [D, 8]], ["fc1_latent_proj.weight", [X, D]],
      ["fc2_latent_proj.weight", [D, X]],
      ...all.shared_gate ? [["shared_expert_gate.weight", [1, D]] as [string, number[]]] : [],
    ];
    for (const [name, shape] of shapes) {
      const drawn = r.normal(shape, name.includes("bias") ? 0 : 0.5);
      const tensor = device.tensor(Float32Array.from(changes[name] ?? drawn.data), shape);
      tensor.requiresGrad = !name.includes("bias");
      made.set(name, tensor);
    }
    this.device = device;
    this.parameters = made;
    this.layer = new MoE(all, new Weights(made));
    this.x = device.tensor(Float32Array.from(r.normal([1, T, D]).data), [1, T, D]);
    this.x.requiresGrad = true;
    this.dy = device.tensor(Float32Array.from(r.normal([1, T, D]).data), [1, T, D]);
  }

  /** Output, what the router did, and all gradients. */
  async run(moe: Partial<MoETraining> | null = null, more: Partial<ForwardContext & MoERun> = {}) {
    const routing: Routing[] = [];
    const { counter = null, replay = null } = more;
    const context: ForwardContext = {
      seq_idx: null, step: null, routing, replay, moe: moe && { ...makeMoETraining(moe), counter },
    };
    const tape = new Tape();
    const y = tape.run(() => scope(() => this.layer.forward(this.x, context)));
    const gradients = tape.backward([y], [this.dy]);
    const read = async (tensor: Tensor) => Array.from(await tensor.read());
    const result = {
      y: await read(y), index: await read(routing[0]!.index), logits: await read(routing[0]!.logits),
      gradients: Object.fromEntries(await Promise.all(
        [["x", this.x] as const, ...this.parameters].map(async ([name, { key }]) =>
          [name, gradients.has(key) ? await read(gradients.get(key)!) : []] as const))),
    };
    for (const tensor of [y, ...gradients.values()]) tensor.release();
    for (const { logits, weight, index } of routing) {
      for (const one of [logits, weight]) one.release();
      if (!replay || replay.isRecording) index.release(); // replayed ones stay with their holder
    }
    return result;
  }

  /** Output of the shared expert alone. */
  async sharedAlone(): Promise<number[]> {
    const y = scope(() => this.layer.shared!.forward(this.x));
    const found = Array.from(await y.read());
    y.dispose();
    return found;
  }

  dispose(): void {
    for (const tensor of [this.x, this.dy, ...this.parameters.values()]) tensor.dispose();
  }
}

type Result = Awaited<ReturnType<Bench["run"]>>;

function close(found: readonly number[], expected: readonly number[], within: number, what: string): void {
  const largest = Math.max(...expected.map(Math.abs), 1e-30);
  const worst = Math.max(0, ...expected.map((value, i) => Math.abs(value - found[i]!)));
  expect(found.length, what).toBe(expected.length);
  expect(worst / largest, what).toBeLessThanOrEqual(within);
}

function same(found: Result, expected: Result, within: number): void {
  close(found.y, expected.y, within, "output");
  for (const [name, gradient] of Object.entries(expected.gradients)) {
    close(found.gradients[name]!, gradient, within, `gradient of ${name}`);
  }
}

const rowsOf = (values: readonly number[]) =>
  Array.from({ length: T }, (_, t) => values.slice(t * D, (t + 1) * D));

await onEveryAdapter((device) => {
  describe("one layer", () => {
    test.each([null, 8])("weights before the down projection change nothing; latent width %j", async (
      latent) => {
      const bench = new Bench(device, { moe_latent_size: latent });
      same(await bench.run({ weighing: "activation" }), await bench.run(), 1e-6);
      bench.dispose();
    });

    test("with them the outputs of the experts are not kept for the backward pass", () => {
      const bench = new Bench(device);
      const kept = (weighing: MoETraining["weighing"]) => {
        const before = device.pool.liveBytes;
        const tape = new Tape();
        const y = tape.run(() => scope(() => bench.layer.forward(
          bench.x, { seq_idx: null, step: null, routing: null, moe: makeMoETraining({ weighing }) })));
        const bytes = device.pool.liveBytes - before;
        tape.dispose();
        y.dispose();
        return bytes;
      };
      // Rows of F instead of rows of D, four bytes each; memory is handed out in larger pieces.
      expect(kept("output") - kept("activation")).toBeGreaterThanOrEqual(4 * T * K * (D - F));
      bench.dispose();
    });

    test("rows filled up to a multiple change no bit", async () => {
      const bench = new Bench(device);
      same(await bench.run({ align: 8 }), await bench.run({ align: 1 }), 0);
      bench.dispose();
    });

    test("with room for all nothing is dropped, padded or not", async () => {
      const bench = new Bench(device);
      const free = await bench.run();
      for (const pad_to_capacity of [false, true]) {
        same(await bench.run({ capacity_factor: E / K, pad_to_capacity }), free, 1e-6);
      }
      bench.dispose();
    });

    test.each([
      { drop_policy: "position", pad_to_capacity: false }, { drop_policy: "position", pad_to_capacity: true },
      { drop_policy: "probs", pad_to_capacity: false }, { drop_policy: "probs", pad_to_capacity: true },
    ] as const)("dropped tokens get the shared expert alone: $drop_policy, padded $pad_to_capacity", async (
      options) => {
      // A gate that reads the first feature, positive for all tokens: every token wants expert 2.
      const gate = Array.from({ length: E * D }, (_, i) => (i === 2 * D ? 1 : 0));
      const bench = new Bench(
        device, { num_experts_per_tok: 1, norm_topk_prob: false }, { "gate.weight": gate });
      const values = await bench.x.read() as Float32Array;
      for (let t = 0; t < T; t++) values[t * D] = 1 + ((7 * t) % T) / T;
      bench.x.write(values);
      const { y, index } = await bench.run({ ...options, capacity_factor: 1 });
      expect(index).toEqual(Array(T).fill(2));
      const alone = rowsOf(await bench.sharedAlone());
      const capacity = T / E;
      const order = Array.from({ length: T }, (_, t) => t).sort((a, b) =>
        options.drop_policy === "probs" ? values[b * D]! - values[a * D]! : a - b);
      const kept = new Set(order.slice(0, capacity));
      rowsOf(y).forEach((row, t) => {
        const difference = Math.max(...row.map((value, d) => Math.abs(value - alone[t]![d]!)));
        if (kept.has(t)) expect(difference, `token ${t}`).toBeGreaterThan(1e-3);
        else expect(difference, `token ${t}`).toBeLessThan(1e-6);
      });
      bench.dispose();
    });

    test("dropping is the same wherever the weights are multiplied in", async () => {
      const bench = new Bench(device);
      const options = { capacity_factor: 0.6, align: 4 } as const;
      same(await bench.run({ ...options, weighing: "activation" }), await bench.run(options), 1e-6);
      bench.dispose();
    });

    test("a shared expert with a gate is what f64 makes of it, and so are its gradients", async () => {
      // Of the routed experts nothing comes.
      const bench = new Bench(
        device, { shared_gate: true }, { "experts.down_proj": Array<number>(E * D * F).fill(0) });
      const values = async (tensor: Tensor) => Array.from(await tensor.read());
      const of = (name: string) => values(bench.parameters.get(name)!);
      const [gate, up, down] = [
        await of("shared_expert_gate.weight"), await of("shared_experts.up_proj.weight"),
        await of("shared_experts.down_proj.weight"),
      ];
      const [xs, dys] = [rowsOf(await values(bench.x)), rowsOf(await values(bench.dy))];
      const dot = (a: readonly number[], b: readonly number[]) => a.reduce((sum, v, i) => sum + v * b[i]!, 0);
      const width = up.length / D;
      const rows = (list: readonly number[], each: number) =>
        Array.from({ length: list.length / each }, (_, i) => list.slice(i * each, (i + 1) * each));
      const expected: Record<"y" | "x" | "gate" | "down", number[]> =
        { y: [], x: [], gate: Array<number>(D).fill(0), down: Array<number>(D * width).fill(0) };
      xs.forEach((x, t) => {
        const dy = dys[t]!;
        const before = rows(up, D).map((row) => Math.max(dot(row, x), 0));
        const inner = before.map((value) => value ** 2);
        const out = rows(down, width).map((row) => dot(row, inner));
        const share = 1 / (1 + Math.exp(-dot(gate, x)));
        const pull = share * (1 - share) * dot(dy, out);
        const dinner = before.map((value, i) =>
          2 * value * share * dot(rows(down, width).map((row) => row[i]!), dy));
        expected.y.push(...out.map((value) => share * value));
        for (let d = 0; d < D; d++) {
          expected.gate[d]! += pull * x[d]!;
          expected.x.push(pull * gate[d]! + dot(dinner, rows(up, D).map((row) => row[d]!)));
          inner.forEach((value, i) => (expected.down[d * width + i]! += share * dy[d]! * value));
        }
      });
      const { y, gradients } = await bench.run();
      close(y, expected.y, 1e-6, "output");
      close(gradients["x"]!, expected.x, 1e-5, "gradient of x");
      close(gradients["shared_expert_gate.weight"]!, expected.gate, 1e-5, "gradient of the gate");
      close(gradients["shared_experts.down_proj.weight"]!, expected.down, 1e-5, "gradient of down");
      bench.dispose();
    });

    test("replayed choices stand whatever the router has learnt since; its gradient flows", async () => {
      const bench = new Bench(device);
      const replay = new RouterReplay();
      const free = await bench.run(null, { replay });
      replay.rewind();
      const again = await bench.run(null, { replay });
      expect(again.index).toEqual(free.index);
      same(again, free, 1e-6);
      bench.layer.correction_bias.write(Float32Array.of(0, 9, 9, 0));
      expect((await bench.run()).index).not.toEqual(free.index);
      replay.rewind();
      const held = await bench.run(null, { replay });
      expect(held.index).toEqual(free.index);
      same(held, free, 1e-6);
      expect(Math.max(...held.gradients["gate.weight"]!.map(Math.abs))).toBeGreaterThan(1e-3);
      await expect(bench.run(null, { replay })).rejects.toThrow(/1 router calls were recorded.*one more/);
      replay.dispose();
      bench.dispose();
    });

    test("a recomputed layer routes as it did the first time", async () => {
      const bench = new Bench(device);
      const plain = await bench.run();
      const context: ForwardContext = { seq_idx: null, step: null, routing: null };
      const tape = new Tape();
      const [y] = tape.run(() => scope(() => recompute([bench.x], (choices) => {
        const routing: Routing[] = [];
        const replay = choices ? new RouterReplay(choices) : null;
        const result = bench.layer.forward(bench.x, { ...context, routing, replay });
        replay?.dispose();
        return [result, promote(routing[0]!.index)];
      })));
      bench.layer.correction_bias.write(Float32Array.of(0, 9, 9, 0));
      const gradients = tape.backward([y!], [bench.dy]);
      for (const [name, { key }] of bench.parameters) {
        const expected = plain.gradients[name]!;
        if (expected.length > 0) close(Array.from(await gradients.get(key)!.read()), expected, 0, name);
      }
      for (const gradient of gradients.values()) gradient.release();
      bench.dispose();
    });

    test("forced balance chooses at random, and the same for the same numbers", async () => {
      const bench = new Bench(device);
      const runs = [];
      for (const step of [0, 0, 1]) {
        const counter = device.tensor(Uint32Array.of(5, 0, step, 0), [4], "u32");
        runs.push(await bench.run({ forced_balance: true }, { counter }));
        counter.dispose();
      }
      const [first, again, later] = runs as [Result, Result, Result];
      const free = await bench.run();
      same(again, first, 0);
      expect(later.index).not.toEqual(first.index);
      expect(first.index).not.toEqual(free.index);
      expect(Math.max(...first.gradients["gate.weight"]!.map(Math.abs))).toBeGreaterThan(1e-3);
      await expect(bench.run({ forced_balance: true })).rejects.toThrow(/counter of random numbers/);
      bench.dispose();
    });

    test("jitter moves logits a little", async () => {
      const bench = new Bench(device);
      const counter = device.tensor(Uint32Array.of(5, 0, 0, 0), [4], "u32");
      const [free, moved] = [await bench.run(), await bench.run({ jitter: 0.01 }, { counter })];
      const difference = Math.max(...free.logits.map((value, i) => Math.abs(value - moved.logits[i]!)));
      expect(difference).toBeGreaterThan(1e-4);
      expect(difference).toBeLessThan(0.01 * D * 3);
      counter.dispose();
      bench.dispose();
    });

    test("a router in bf16 loses digits, and its gradients are f32 all the same", async () => {
      const bench = new Bench(device);
      const [free, low] = [await bench.run(), await bench.run({ router_dtype: "bf16" })];
      const largest = Math.max(...free.logits.map(Math.abs));
      const worst = Math.max(...free.logits.map((value, i) => Math.abs(value - low.logits[i]!))) / largest;
      expect(worst).toBeGreaterThan(2 ** -12);
      expect(worst).toBeLessThan(2 ** -6);
      expect(low.gradients["gate.weight"]).toHaveLength(E * D);
      const halves = low.logits.every((value) => Math.fround(value) === value &&
        new Uint32Array(Float32Array.of(value).buffer)[0]! % 65536 === 0);
      expect(halves).toBe(true);
      bench.dispose();
    });

    test("Sinkhorn routing evens out experts that a router would not", async () => {
      const r = new Draw(3);
      const gate = Array.from(r.normal([E, D], 0.2).data);
      const bench = new Bench(device, {
        scoring_func: "softmax", norm_topk_prob: false, router_choice: "logits",
      }, { "gate.weight": gate.map((value, i) => value + (i % D === 0 ? Math.floor(i / D) : 0)) });
      const values = await bench.x.read() as Float32Array;
      for (let t = 0; t < T; t++) values[t * D] = 1; // logits rise with the expert's number
      bench.x.write(values);
      const most = ({ index }: Result) =>
        Math.max(...Array.from({ length: E }, (_, e) => index.filter((each) => each === e).length));
      const free = most(await bench.run());
      expect(free).toBeGreaterThan(0.8 * T);
      expect(most(await bench.run({ routing: "sinkhorn" }))).toBeLessThan(0.8 * free);
      bench.dispose();
    });
  });
});
