import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { provider } from "#gpu";
import { cli } from "../../src/cli/cli.ts";
import { lending } from "../support/lending.ts";

export const root = fileURLToPath(new URL("../..", import.meta.url));
export const fixture = (name: string) => join(root, "test/fixtures", name);

export interface Finished {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Starts the command line in a process of its own. `onStdout` sees the output as it comes. */
export function krait(
  args: readonly string[], onStdout?: (text: string, child: ChildProcess) => void,
  env: Readonly<Record<string, string>> = {}, started?: (child: ChildProcess) => void,
): Promise<Finished> {
  const child = spawn(process.execPath, [join(root, "src/cli/krait.mjs"), ...args], {
    cwd: root, stdio: ["ignore", "pipe", "pipe"], env: { ...process.env, ...env },
  });
  started?.(child);
  let stdout = "";
  let stderr = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    stdout += text;
    onStdout?.(text, child);
  });
  child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code, signal) => resolve({ code, signal, stdout, stderr }));
  });
}

const { listAdapters } = provider;
let running = 0;

/**
 * Runs the command line in this process, without the second that a new one takes to start, and with the
 * kernels that others have compiled. Each command is also run in a process somewhere.
 */
export async function here(args: readonly string[]): Promise<Finished> {
  let [stdout, stderr] = ["", ""];
  const io = {
    stdout: { write: (text: string) => void (stdout += text) },
    stderr: { write: (text: string) => void (stderr += text) }, env: process.env,
  };
  if (running++ === 0) provider.listAdapters = async () => (await listAdapters()).map(lending);
  try {
    const code = await cli(args, { io, signal: new AbortController().signal });
    return { code, signal: null, stdout, stderr };
  } finally {
    if (--running === 0) provider.listAdapters = listAdapters;
  }
}

/** Runs `body` with an empty folder that is removed afterwards. */
export async function withFolder<T>(body: (folder: string) => Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), "krait-"));
  try {
    return await body(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** The JSON lines of an output. */
export function jsonLines(text: string): Record<string, unknown>[] {
  return text.split("\n").filter((line) => line.startsWith("{"))
    .map((line) => JSON.parse(line) as Record<string, unknown>);
}
