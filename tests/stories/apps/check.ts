// Runs the page's Drizzle code on the database of a story.
import { deepStrictEqual, ok, strictEqual } from 'node:assert'
import { drizzle } from 'drizzle-orm/node-postgres'
import { Client } from 'pg'
import { desktopsOf, historyOf, startDesktop, stopDesktop } from './orm'

async function main() {
  const client = new Client({ connectionString: process.env.DATABASE_URL })
  await client.connect()
  const [db, user] = [drizzle(client), process.env.USER_ID!]

  const first = await startDesktop(db, user, 60)
  const left = first.timeoutAt.getTime() - Date.now()
  ok(left > 50 * 60_000 && left <= 61 * 60_000, `an hour is left, not ${left} ms`)
  const second = await startDesktop(db, user, 60)
  deepStrictEqual((await desktopsOf(db, user)).map(({ id }) => id), [second.id, first.id])

  const stopped = await stopDesktop(db, user, first.id)
  deepStrictEqual([stopped.status, stopped.reason, stopped.endedAt], ['terminated', 'requested', null])
  strictEqual((await stopDesktop(db, user, first.id)).status, 'terminated', 'asking twice does no harm')
  strictEqual(await stopDesktop(db, first.id, second.id), undefined, 'a row of somebody else is not there')
  deepStrictEqual((await historyOf(db, first.id)).map(({ toStatus }) => toStatus), ['pending', 'terminated'])
  await client.end()
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
