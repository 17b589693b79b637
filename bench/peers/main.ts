/** The suite `peers` of `krait bench`: Krait and other engines, case by case, round by round. */
import { execFileSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import type { Device } from "../../src/index.ts";
import { CASES, type Case, F32_BOUND } from "./cases.ts";
import { kraitEngine } from "./krait.ts";
import { PEERS } from "./peers.ts";
import { PeerProcess, type SoftwareDriver } from "./process.ts";
import { comparison, type PeerResult, relativeError, repetitions } from "./protocol.ts";
import type { Prepared } from "./runner.ts";

export { summarise } from "./protocol.ts";

const ROUND_MS = 100;
/** An application this long is not repeated to be warm. */
const LONG_MS = 5_000;
/** Between two engines, so that spinning threads of the one before have come to rest. */
const PAUSE_MS = 30;
/** A peer that has had this long in a case and been timed three times is left out of the rounds to come. */
const PATIENCE_MS = 45_000;

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
  const cases = CASES.filter(({ name }) => filter.length === 0 || filter.some((part) => name.includes(part)));
  const peers: PeerProcess[] = [];
  for (const peer of PEERS) {
    if (!cases.some((wanted) => isFor(peer, wanted))) continue;
    if (existsSync(path(peer.needs))) peers.push(new PeerProcess(peer, device.info.id, software));
    else complain(`${peer.name}: not installed; npm install --ignore-scripts --prefix bench/peers\n`);
  }
  try {
    for (const wanted of cases) {
      const able = peers.filter(({ peer }) => isFor(peer, wanted));
      try {
        await benchCase(device, wanted, able, runs, report, complain);
      } catch (failure) {
        complain(`krait, ${wanted.name}: ${(failure as Error).message}\n`);
      }
    }
  } finally {
    for (const peer of peers) peer.close();
  }
}

function isFor(peer: { readonly isModel?: boolean }, wanted: Case): boolean {
  return (peer.isModel ?? false) === (wanted.model !== undefined);
}

interface Contender {
  readonly peer: PeerProcess;
  readonly version: string;
  readonly note: string;
  readonly error: number;
  readonly repeat: number;
  readonly times: number[];
  readonly ours: number[];
  /** Milliseconds that its timed rounds took. */
  spent: number;
}

async function benchCase(
  device: Device, wanted: Case, peers: readonly PeerProcess[], runs: number,
  report: (result: PeerResult) => void, complain: (line: string) => void,
): Promise<void> {
  const inputs = wanted.inputs();
  const expected = wanted.expected(inputs);
  const krait = await kraitEngine(device).prepare(wanted) as Prepared;
  // Weights that Krait rounded in its own way have an answer of their own.
  const own = krait.rounded ? wanted.expected({ ...inputs, ...await krait.rounded() }) : expected;
  const error = relativeError(await krait.sample(own.indices), own.values, own.base);
  const repeat = await warmUp(krait.run, wanted);
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
        peer, version, note: what, times: [], ours: [], spent: 0,
        error: relativeError(sampled.numbers, expected.values, expected.base),
        repeat: await warmUp((n) => timed(peer, n), wanted),
      };
    });
    if (ready) contenders.push(ready);
  }
  for (let round = 0; round < runs; round++) {
    await pause();
    const ours = await krait.run(repeat);
    for (const contender of contenders) {
      const { times, repeat: links } = contender;
      if (times.length >= 3 && contender.spent > PATIENCE_MS) continue;
      await pause();
      const start = performance.now();
      const ms = await orComplain(contender.peer, () => timed(contender.peer, links));
      if (ms === null) {
        contenders = contenders.filter((other) => other !== contender);
        continue;
      }
      contender.spent += performance.now() - start;
      times.push(ms);
      contender.ours.push(ours);
    }
  }
  await krait.dispose();
  const { version } = JSON.parse(readFileSync(path("../../package.json"), "utf8")) as { version: string };
  const figure = (x: number) => (Number.isFinite(x) ? Number(x.toPrecision(3)) : null);
  const bound = wanted.bound ?? F32_BOUND;
  for (const { peer, version: theirs, note, error: theirError, times, ours } of contenders) {
    report({
      case: wanted.name, adapter: device.info.id, adapter_name: device.info.name, peer: peer.name,
      ...comparison(ours, times),
      rel_err: figure(error), peer_rel_err: figure(theirError), bound, ok: error <= bound,
      peer_ok: theirError <= bound, peer_kind: peer.peer.kind,
      krait_op: krait.note ? `${wanted.krait_op} (${krait.note})` : wanted.krait_op, peer_op: note,
      krait_version: version, peer_version: theirs, commit: commit(),
    });
  }
}

/** Runs the op until it is compiled and a round's repetitions are known. */
async function warmUp(run: (n: number) => Promise<number>, { least = 1, most }: Case): Promise<number> {
  let repeat = least;
  const start = performance.now();
  await run(repeat);
  if (performance.now() - start > LONG_MS) return repeat;
  for (let i = 0; i < 2; i++) {
    const ms = await run(repeat);
    if (ms * repeat > 10 * ROUND_MS) return repeat;
    repeat = repetitions(ms, ROUND_MS, Math.min(most, repeat * 8), least);
  }
  if (repeat > least) await run(repeat);
  return repeat;
}

/** The sources' commit, with a plus sign where they were changed; null outside of a clone. */
function commit(): string | null {
  const git = (...args: string[]) =>
    execFileSync("git", args, { cwd: path("."), encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim(
      );
  try {
    const changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/shaders",
      ":/bench/peers");
    return git("rev-parse", "--short=10", "HEAD") + (changed ? "+" : "");
  } catch {
    return null;
  }
}
