/** The suite `peers` of `krait bench`: Krait and other engines, case by case, round by round. */
import { existsSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import type { Device } from "../../src/index.ts";
import { CASES, type Case } from "./cases.ts";
import { kraitEngine } from "./krait.ts";
import { PeerProcess, type SoftwareDriver } from "./process.ts";
import { comparison, type PeerResult, relativeError, repetitions } from "./protocol.ts";
import type { Prepared } from "./runner.ts";

/** Every peer and the package, relative to this folder, without which it cannot start. */
const PEERS: readonly (readonly [name: string, needs: string])[] = [
  ["onnxruntime-webgpu", "node_modules/onnxruntime-node"],
  ["tfjs-webgpu", "node_modules/@tensorflow/tfjs-backend-webgpu"],
  ["jax-js-webgpu", "node_modules/@jax-js/jax"],
  ["gpu.js-webgpu", "../../node_modules/gpu.js"],
  ["onnxruntime-cpu", "node_modules/onnxruntime-node"],
];
const ROUND_MS = 100;
/** Between two engines, so that spinning threads of the one before have come to rest. */
const PAUSE_MS = 30;

const path = (relative: string) => fileURLToPath(new URL(relative, import.meta.url));
const pause = () => new Promise((resolve) => setTimeout(resolve, PAUSE_MS));

/**
 * Measures the cases whose name contains one of `filter` (all, if it is empty) and reports each peer's line.
 * Peers that are missing, cannot start or fail in a case are told to `complain`, in one line each.
 */
export async function benchPeers(
  device: Device, runs: number, filter: readonly string[],
  report: (result: PeerResult) => void, complain: (line: string) => void, software: SoftwareDriver | null,
): Promise<void> {
  const adapter = device.info.id;
  const peers: PeerProcess[] = [];
  for (const [name, needs] of PEERS) {
    if (existsSync(path(needs))) peers.push(new PeerProcess(name, adapter, software));
    else complain(`${name}: not installed; npm install --ignore-scripts --prefix bench/peers\n`);
  }
  try {
    for (const wanted of CASES) {
      if (filter.length > 0 && !filter.some((part) => wanted.name.includes(part))) continue;
      await benchCase(device, wanted, peers, runs, report, complain);
    }
  } finally {
    for (const peer of peers) peer.close();
  }
}

interface Contender {
  readonly peer: PeerProcess;
  readonly version: string;
  readonly note: string;
  readonly error: number;
  readonly repeat: number;
  readonly times: number[];
  readonly ours: number[];
}

async function benchCase(
  device: Device, wanted: Case, peers: readonly PeerProcess[], runs: number,
  report: (result: PeerResult) => void, complain: (line: string) => void,
): Promise<void> {
  const expected = wanted.expected(wanted.inputs());
  const krait = await kraitEngine(device).prepare(wanted) as Prepared;
  const error = relativeError(await krait.sample(expected.indices), expected.values, expected.base);
  const repeat = await warmUp(krait.run, wanted.most);
  let contenders: Contender[] = [];
  const ask = async (peer: PeerProcess, ...[request]: Parameters<PeerProcess["ask"]>) => {
    const reply = await peer.ask(request);
    if (!reply.ok) throw new Error(reply.error);
    return reply;
  };
  const orComplain = async <T>(peer: PeerProcess, body: () => Promise<T>): Promise<T | null> => {
    try {
      return await body();
    } catch (failure) {
      const why = (failure as Error).message || "it has no op for this.";
      complain(`${peer.name}, ${wanted.name}: ${why}\n`);
      return null;
    }
  };
  const timed = async (peer: PeerProcess, n: number) => (await ask(peer, { verb: "run", n })).numbers[0]!;
  for (const peer of peers) {
    const ready = await orComplain(peer, async () => {
      const { note } = await ask(peer, { verb: "prepare", name: wanted.name });
      const sampled = await ask(peer, { verb: "sample", indices: expected.indices });
      const [version, what] = JSON.parse(note) as [string, string];
      return {
        peer, version, note: what, times: [], ours: [],
        error: relativeError(sampled.numbers, expected.values, expected.base),
        repeat: await warmUp((n) => timed(peer, n), wanted.most),
      };
    });
    if (ready) contenders.push(ready);
  }
  for (let round = 0; round < runs; round++) {
    await pause();
    const ours = await krait.run(repeat);
    for (const contender of contenders) {
      await pause();
      const ms = await orComplain(contender.peer, () => timed(contender.peer, contender.repeat));
      if (ms === null) {
        contenders = contenders.filter((other) => other !== contender);
        continue;
      }
      contender.times.push(ms);
      contender.ours.push(ours);
    }
  }
  await krait.dispose();
  const { version } = JSON.parse(readFileSync(path("../../package.json"), "utf8")) as { version: string };
  const figure = (x: number) => (Number.isFinite(x) ? Number(x.toPrecision(3)) : null);
  for (const { peer, version: theirs, note, error: theirError, times, ours } of contenders) {
    report({
      case: wanted.name, adapter: device.info.id, adapter_name: device.info.name, peer: peer.name,
      ...comparison(ours, times),
      rel_err: figure(error), peer_rel_err: figure(theirError), krait_op: wanted.krait_op, peer_op: note,
      krait_version: version, peer_version: theirs,
    });
  }
}

/** Runs the op until it is compiled and a round's repetitions are known. */
async function warmUp(run: (n: number) => Promise<number>, most: number): Promise<number> {
  await run(1);
  let repeat = 1;
  for (let i = 0; i < 2; i++) repeat = repetitions(await run(repeat), ROUND_MS, Math.min(most, repeat * 8));
  if (repeat > 1) await run(repeat);
  return repeat;
}
