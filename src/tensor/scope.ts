/** What a scope frees at its end. */
interface Scoped {
  release(): void;
}

interface Scope {
  readonly tensors: Set<Scoped>;
  readonly outer: Scope | null;
}

let current: Scope | null = null;

/** Puts a new tensor into the innermost scope; outside of every scope its maker owns it. */
export function register(tensor: Scoped): void {
  current?.tensors.add(tensor);
}

/**
 * Runs `body` and then frees every tensor made inside it, except those it returns (found in arrays, maps and plain
 * objects), which pass to the scope around it. Synchronous: nothing in `body` may await.
 */
export function scope<T>(body: () => T): T {
  const mine: Scope = { tensors: new Set(), outer: current };
  current = mine;
  try {
    const result = body();
    promote(result);
    return result;
  } finally {
    current = mine.outer;
    for (const tensor of mine.tensors) tensor.release();
  }
}

/** Hands the tensors that a value holds to the scope around the running one, so that they outlive it. */
export function promote<T>(value: T): T {
  const running = current;
  if (running) {
    forEachScoped(value, running.tensors, (tensor) => {
      running.tensors.delete(tensor);
      running.outer?.tensors.add(tensor);
    });
  }
  return value;
}

/** Runs `body` outside of every scope: what it makes belongs to whoever holds it. */
export function unscoped<T>(body: () => T): T {
  const outer = current;
  current = null;
  try {
    return body();
  } finally {
    current = outer;
  }
}

function forEachScoped(value: unknown, set: ReadonlySet<Scoped>, visit: (tensor: Scoped) => void): void {
  if (typeof value !== "object" || value === null) return;
  if (set.has(value as Scoped)) return visit(value as Scoped);
  if (Array.isArray(value)) for (const item of value) forEachScoped(item, set, visit);
  else if (value instanceof Map) for (const item of value.values()) forEachScoped(item, set, visit);
  else if (Object.getPrototypeOf(value) === Object.prototype) {
    for (const item of Object.values(value)) forEachScoped(item, set, visit);
  }
}
