"""A small Hugging Face Hub on loopback: what the huggingface_hub client asks while it publishes and loads models.

    python tests/hub_server.py FOLDER [--port PORT]

prints the address for HF_ENDPOINT. Repositories live in FOLDER. Clients need HF_HUB_DISABLE_XET=1, and a token of
`TOKENS` to write. Any step can be told to fail (`Hub.faults`). The step 'xet' exists only to fail: repositories with
such a fault offer downloads through hf_xet, from a storage that answers 404.
"""
import argparse
import base64
import hashlib
import json
import os
import re
import socket
import threading
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple, Union
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# Who may write where. Everybody may read what is not private.
TOKENS: Dict[str, Set[str]] = {
    'hf_writer': {'timm-mobileformer', 'my-org', 'others'},
    'hf_reader': set(),
}
_REPO = r'(?P<repo>[^/]+/[^/]+?)'
STEPS = [  # name, method, path
    ('create', 'POST', r'/api/repos/create'),
    ('yaml', 'POST', r'/api/validate-yaml'),
    ('info', 'GET', rf'/api/models/{_REPO}(/revision/(?P<rev>[^/]+))?'),
    ('tree', 'GET', rf'/api/models/{_REPO}/tree/(?P<rev>[^/]+)'),
    ('branch', 'POST', rf'/api/models/{_REPO}/branch/(?P<rev>[^/]+)'),
    ('preupload', 'POST', rf'/api/models/{_REPO}/preupload/(?P<rev>[^/]+)'),
    ('xet', 'GET', rf'/api/models/{_REPO}/xet-read-token/(?P<rev>[^/]+)'),
    ('batch', 'POST', rf'/{_REPO}\.git/info/lfs/objects/batch'),
    ('put', 'PUT', rf'/{_REPO}/lfs/(?P<oid>[0-9a-f]{{64}})'),
    ('commit', 'POST', rf'/api/models/{_REPO}/commit/(?P<rev>[^/]+)'),
    ('head', 'HEAD', rf'/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)'),
    ('get', 'GET', rf'/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)'),
]
WRITES = {'create', 'branch', 'preupload', 'batch', 'put', 'commit'}
# A status to answer with, 'drop' (the connection, half-way), 'lose' (the answer, after the work), or what to do first
# (say, kill the client) before the connection is dropped.
Fault = Union[int, str, Callable[[], None]]


class Refusal(Exception):
    """An answer of the Hub that is no success: a status, its X-Error-Code, its X-Error-Message."""

    def __init__(self, status: int, code: str = '', message: str = '', **body: Any):
        super().__init__(message or HTTPStatus(status).phrase)
        self.status, self.code, self.body = status, code, body


class Hub:
    """The repositories, each a history of commits; files are kept by their hash."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.endpoint = ''
        self.lock = threading.Lock()
        self.faults: Dict[Tuple[Optional[str], str], Fault] = {}  # by repository and step
        self.log: List[Tuple[Optional[str], str]] = []

    def _state(self, repo: str) -> Path:
        return self.folder / repo / 'repo.json'

    def file(self, repo: str, oid: str) -> Path:
        return self.folder / repo / 'files' / oid

    def exists(self, repo: str) -> bool:
        return self._state(repo).is_file()

    def load(self, repo: str) -> Dict[str, Any]:
        return json.loads(self._state(repo).read_text())

    def save(self, repo: str, state: Dict[str, Any]) -> None:
        path = self._state(repo)
        new = path.with_suffix('.new')
        new.write_text(json.dumps(state, indent=1))
        os.replace(new, path)

    def create(self, repo: str, private: bool = False) -> None:
        (self.folder / repo / 'files').mkdir(parents=True)
        attributes = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'
        self.save(repo, {'private': private, 'refs': {}, 'commits': {}})
        self.commit(repo, 'main', {'.gitattributes': self.keep(repo, attributes)}, 'initial commit')

    def keep(self, repo: str, content: bytes, lfs: bool = False) -> Dict[str, Any]:
        """Store a file; what a tree says about it."""
        oid = hashlib.sha256(content).hexdigest() if lfs else \
            hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
        path = self.file(repo, oid)
        new = path.with_suffix(f'.{threading.get_ident()}')
        new.write_bytes(content)
        os.replace(new, path)
        return {'oid': oid, 'size': len(content), 'lfs': lfs}

    def commit(self, repo: str, ref: str, changes: Dict[str, Any], title: str, base: Optional[str] = None) -> str:
        state = self.load(repo)
        parent = state['refs'].get(base or ref)
        files = {**state['commits'].get(parent, {'files': {}})['files'], **changes}
        commit = {'parent': parent, 'title': title, 'files': files}
        oid = hashlib.sha1(json.dumps([repo, ref, commit]).encode()).hexdigest()
        state['commits'][oid] = commit
        state['refs'][ref] = oid
        self.save(repo, state)
        return oid

    def files(self, repo: str, rev: str = 'main') -> Dict[str, bytes]:
        """What a reader of a repository sees."""
        state = self.load(repo)
        tree = state['commits'][state['refs'].get(rev, rev)]['files']
        return {path: self.file(repo, f['oid']).read_bytes() for path, f in tree.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub
    fault: Optional[Fault]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.fault = None
        matches = [(s, re.fullmatch(pattern, url.path)) for s, method, pattern in STEPS if method == self.command]
        step, match = next((m for m in matches if m[1]), ('', None))
        if match is None:
            self.refuse(Refusal(404))
            return
        groups = {k: v and unquote(v) for k, v in match.groupdict().items()}
        repo = groups.pop('repo', None)
        length = int(self.headers.get('Content-Length') or 0)
        self.body = b'' if step == 'put' else self.rfile.read(length)
        if step == 'create':
            wanted = json.loads(self.body)
            repo = f'{wanted.get("organization") or "me"}/{wanted["name"]}'
        if step == 'yaml':  # a model card tells its repository where it tells how to load it
            match = re.search(r"hf-hub:([^'@]+)", json.loads(self.body)['content'])
            repo = match and match[1]
        self.hub.log.append((repo, step))
        self.fault = self.hub.faults.get((repo, step))
        try:
            if step == 'put':
                half = self.fault and not isinstance(self.fault, int)
                self.body = self.rfile.read(length // 2 if half else length)
            if self.fault and step != 'get' and self.fault != 'lose':
                self.fail()
                return
            self.authorize(repo, step)
            getattr(self, f'on_{step}')(repo, **groups)
        except Refusal as e:
            self.refuse(e)

    do_POST = do_PUT = do_HEAD = do_GET

    def fail(self) -> None:
        if isinstance(self.fault, int):
            self.refuse(Refusal(self.fault, message='told to fail'))
            return
        if callable(self.fault):
            self.fault()
        self.drop()

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, e: Refusal) -> None:
        self.answer(e.status, {'error': str(e), **e.body}, **{'X-Error-Code': e.code, 'X-Error-Message': str(e)})

    def answer(self, status: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.fault == 'lose':
            self.drop()
            return
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def authorize(self, repo: Optional[str], step: str) -> None:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if step == 'put':
            return  # its address is the permission, as with the real storage
        if token and token not in TOKENS:
            raise Refusal(401, message='Invalid credentials in Authorization header')
        if step == 'yaml':
            return
        member = repo.split('/')[0] in TOKENS.get(token, set())
        if step != 'create' and (not self.hub.exists(repo) or self.hub.load(repo)['private'] and not member):
            raise Refusal(404 if token else 401, 'RepoNotFound', 'Repository not found')
        if step in WRITES and not member:
            if not token:
                raise Refusal(401, message='Invalid username or password.')
            raise Refusal(403, message=f'You have no right to write to "{repo}"')

    def revision(self, repo: str, rev: Optional[str]) -> Tuple[str, Dict[str, Any]]:
        """The commit of a branch, or of a commit's hash."""
        state = self.hub.load(repo)
        oid = state['refs'].get(rev or 'main', rev)
        if oid not in state['commits']:
            raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {rev}')
        return oid, state['commits'][oid]['files']

    def on_create(self, repo: str) -> None:
        wanted = json.loads(self.body)
        url = f'{self.hub.endpoint}/{repo}'
        with self.hub.lock:
            if self.hub.exists(repo):
                raise Refusal(409, message='You already created this model repo', url=url)
            self.hub.create(repo, wanted.get('visibility') == 'private' or bool(wanted.get('private')))
        self.answer(200, {'url': url, 'name': repo})

    def on_yaml(self, repo: Optional[str]) -> None:
        content = json.loads(self.body)['content']
        try:
            yaml.safe_load(content.split('---\n')[1])
        except (IndexError, yaml.YAMLError) as e:
            raise Refusal(400, message=str(e), errors=[{'message': str(e)}], warnings=[]) from e
        self.answer(200, {'errors': [], 'warnings': []})

    def on_info(self, repo: str, rev: Optional[str]) -> None:
        oid, files = self.revision(repo, rev)
        self.answer(200, {
            'id': repo, 'modelId': repo, 'sha': oid, 'private': self.hub.load(repo)['private'], 'tags': [],
            'siblings': [{'rfilename': path} for path in files],
        })

    def on_tree(self, repo: str, rev: str) -> None:
        _, files = self.revision(repo, rev)
        self.answer(200, [
            {
                'type': 'file', 'path': path, 'oid': f['oid'][:40], 'size': f['size'],
                **({'lfs': {'oid': f['oid'], 'size': f['size'], 'pointerSize': 134}} if f['lfs'] else {}),
            } for path, f in files.items()
        ])

    def on_branch(self, repo: str, rev: str) -> None:
        with self.hub.lock:
            state = self.hub.load(repo)
            if rev in state['refs']:
                raise Refusal(409, message='Reference already exists')
            state['refs'][rev] = state['refs']['main']
            self.hub.save(repo, state)
        self.answer(200, {})

    def on_preupload(self, repo: str, rev: str) -> None:
        _, files = self.revision(repo, rev)
        self.answer(200, {'files': [
            {
                'path': f['path'], 'shouldIgnore': False, 'oid': files.get(f['path'], {}).get('oid'),
                'uploadMode': 'lfs' if f['path'].endswith(('.safetensors', '.bin')) else 'regular',
            } for f in json.loads(self.body)['files']
        ]})

    def on_batch(self, repo: str) -> None:
        objects = []
        for f in json.loads(self.body)['objects']:
            upload = {'upload': {'href': f'{self.hub.endpoint}/{repo}/lfs/{f["oid"]}'}}
            known = self.hub.file(repo, f['oid']).is_file()
            objects.append({**f, **({} if known else {'actions': upload})})
        self.answer(200, {'transfer': 'basic', 'objects': objects})

    def on_put(self, repo: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message='The content is not what was announced')
        self.hub.keep(repo, self.body, lfs=True)
        self.answer(200, {})

    def on_xet(self, repo: str, rev: str) -> None:
        self.answer(200, {}, **{
            'X-Xet-Cas-Url': f'{self.hub.endpoint}/no/storage', 'X-Xet-Access-Token': 'xet',
            'X-Xet-Token-Expiration': '9999999999'})

    def on_commit(self, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line['value'] for line in lines if line['key'] == 'header')
        changes = {}
        for key, value in ((line['key'], line['value']) for line in lines):
            if key == 'file':
                changes[value['path']] = self.hub.keep(repo, base64.b64decode(value['content']))
            elif key == 'lfsFile':
                if not self.hub.file(repo, value['oid']).is_file():
                    raise Refusal(400, message=f'{value["path"]} was not uploaded')
                changes[value['path']] = {'oid': value['oid'], 'size': value['size'], 'lfs': True}
        with self.hub.lock:
            head, _ = self.revision(repo, rev)
            if header.get('parentCommit', head) != head:
                raise Refusal(412, message='A commit has happened since. Please refresh and try again.')
            number = 1 + sum(ref.startswith('refs/pr/') for ref in self.hub.load(repo)['refs'])
            proposed = 'create_pr' in self.query
            ref = f'refs/pr/{number}' if proposed else rev
            oid = self.hub.commit(repo, ref, changes, header['summary'], base=rev)
        self.answer(200, {
            'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.endpoint}/{repo}/commit/{oid}',
            **({'pullRequestUrl': f'{self.hub.endpoint}/{repo}/discussions/{number}'} if proposed else {}),
        })

    def on_get(self, repo: str, rev: str, path: str) -> None:
        oid, files = self.revision(repo, rev)
        if path not in files:
            raise Refusal(404, 'EntryNotFound', 'Entry not found')
        f = files[path]
        content = self.hub.file(repo, f['oid']).read_bytes()
        headers = {'X-Repo-Commit': oid, 'ETag': f'"{f["oid"]}"', 'Accept-Ranges': 'bytes'}
        if f['lfs']:
            headers.update({'X-Linked-ETag': f'"{f["oid"]}"', 'X-Linked-Size': str(f['size'])})
            if (repo, 'xet') in self.hub.faults:
                token = f'{self.hub.endpoint}/api/models/{repo}/xet-read-token/{oid}'
                headers.update({'X-Xet-Hash': f['oid'], 'X-Xet-Refresh-Route': token})
        status, first, last = 200, 0, len(content) - 1
        if match := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            status, first, last = 206, int(match[1]), min(last, int(match[2] or last))
            headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
        if self.command == 'HEAD' or not self.fault:
            self.answer(status, content[first:last + 1], **headers)
        elif self.fault == 'drop':  # never more than the first half reaches the client
            self.send_response(status)
            for name, value in {'Content-Length': str(last + 1 - first), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[first:len(content) // 2])
            self.drop()
        else:
            self.fail()

    on_head = on_get


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that were killed or dropped


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[Hub]:
    """Serve the repositories in a folder as long as the context lasts; `Hub.endpoint` is where."""
    hub = Hub(folder)
    with _Server(('127.0.0.1', port), type('HubHandler', (Handler,), {'hub': hub})) as server:
        hub.endpoint = f'http://127.0.0.1:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--port', type=int, default=0)
    cli = parser.parse_args()
    with serve(cli.folder, cli.port) as running:
        print(running.endpoint, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
