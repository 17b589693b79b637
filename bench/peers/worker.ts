/** The process of one peer: reads requests on standard input, answers on file descriptor 3. */
import { writeSync } from "node:fs";
import { createInterface } from "node:readline";
import { CASES } from "./cases.ts";
import { PEERS } from "./peers.ts";
import { type Reply, parseRequest } from "./protocol.ts";
import type { Engine, Prepared } from "./runner.ts";

const REPLIES = 3;

async function open(name: string, adapter: string): Promise<Engine> {
  const peer = PEERS.find((other) => other.name === name);
  if (!peer) throw new Error(`There is no peer "${name}".`);
  return peer.open(adapter);
}

const [, , peer = "", adapter = ""] = process.argv;
let engine: Engine | null = null;
let ready: Prepared | null = null;

async function answer(line: string): Promise<Reply> {
  const request = parseRequest(line);
  if (request.verb === "prepare") {
    await ready?.dispose();
    ready = null;
    engine ??= await open(peer, adapter);
    const wanted = CASES.find(({ name }) => name === request.name);
    if (!wanted) throw new Error(`There is no case "${request.name}".`);
    ready = await engine.prepare(wanted);
    if (!ready) return { ok: false, error: "" };
    return { ok: true, numbers: [], note: JSON.stringify([engine.version, ready.note]) };
  }
  if (!ready) throw new Error(`"${request.verb}" came before a case was prepared.`);
  if (request.verb === "run") return { ok: true, numbers: [await ready.run(request.n)], note: "" };
  if (request.verb === "sample") return { ok: true, numbers: await ready.sample(request.indices), note: "" };
  process.exit(0);
}

for await (const line of createInterface({ input: process.stdin })) {
  let reply: Reply;
  try {
    reply = await answer(line);
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    reply = { ok: false, error: said.split("\n")[0]!.slice(0, 300) || "It failed without a word." };
  }
  writeSync(REPLIES, `${JSON.stringify(reply)}\n`);
}
process.exit(0);
