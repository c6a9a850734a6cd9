"""Google Drive on loopback, as gdown and torchvision meet it: a proxy that answers for every https address itself.

Drive was never asked: pages and redirects are what gdown looks for and reports. Clients need HTTPS_PROXY, and
REQUESTS_CA_BUNDLE for the certificate that openssl writes.
"""
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Union
from urllib.parse import parse_qs, urlsplit

HOSTS = 'drive.google.com', 'drive.usercontent.google.com', 'accounts.google.com'
QUOTA = 'Too many users have viewed or downloaded this file recently. Please try accessing the file again later.'
PAGES = {
    'confirm': '<title>Google Drive - Virus scan warning</title><form id="download-form" method="get" '
               'action="https://drive.usercontent.google.com/download">'
               '<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">'
               '<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="u-1"></form>',
    'quota': '<title>Google Drive - Quota exceeded</title>\n<p class="uc-error-caption">Sorry, you can\'t view or '
             f'download this file at this time.</p>\n<p class="uc-error-subcaption">{QUOTA}</p>',
    'sign in': '<title>Sign in - Google Accounts</title><form action="/v3/signin/identifier"></form>',
    'gone': '<title>Error 404 (Not Found)!!1</title>',
    'error': '<title>Error 500 (Server Error)!!1</title>',
}


class Drive:
    """The files by identifier, and how Drive answers to each."""

    def __init__(self) -> None:
        self.files: Dict[str, bytes] = {}
        # A page of PAGES; 'html' instead of the file; half of it by 'short' or 'drop', or what to do before the drop; a
        # pause in the middle by 'slow' and a long one by 'stall'; 'redirects' or 'pages' that lead to themselves.
        self.ways: Dict[str, Union[str, Callable[[], None]]] = {}
        self.log: List[str] = []  # the identifiers that were asked for
        self.env: Dict[str, str] = {}  # for clients


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    drive: Drive
    tls: ssl.SSLContext

    def log_message(self, *args: Any) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.host = self.path.partition(':')[0]
        if self.host not in HOSTS:
            self.send_error(403)  # libraries of other tests in this process report home
            return
        self.send_response(200)
        self.end_headers()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile('rb'), self.connection.makefile('wb')
        self.close_connection = False

    def answer(self, status: int, body: Union[bytes, str] = b'', **headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {'Content_Type': 'text/html; charset=utf-8', 'Content_Length': str(len(content)),
                            **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        file_id = query.get('id', '')
        if self.host == 'drive.google.com':
            self.drive.log.append(file_id)
        way = self.drive.ways.get(file_id, '')
        if self.host == 'accounts.google.com':
            self.answer(200, PAGES['sign in'])
        elif way == 'redirects':
            self.answer(302, Location=f'https://{self.host}{self.path}')
        elif way == 'pages':
            self.answer(200, PAGES['confirm'].format(id=file_id))
        elif way == 'sign in':
            self.answer(302, Location=f'https://accounts.google.com/ServiceLogin?continue={file_id}')
        elif way == 'gone' or file_id not in self.drive.files:
            self.answer(404, PAGES['gone'])
        elif way == 'error':
            self.answer(500, PAGES['error'])
        elif self.host == 'drive.google.com':
            self.answer(303, Location=f'https://drive.usercontent.google.com/download?id={file_id}&export=download')
        elif way == 'quota' or way == 'confirm' and 'confirm' not in query:
            self.answer(200, PAGES[way].format(id=file_id))
        else:
            self.send_file(self.drive.files[file_id], way)

    def send_file(self, content: bytes, way: Union[str, Callable[[], None]]) -> None:
        headers = {'Content_Type': 'application/octet-stream',
                   'Content_Disposition': 'attachment; filename="checkpoint.pth.tar"'}
        if way == 'html':
            self.answer(200, '<!DOCTYPE html><title>Welcome to this hotel</title>', **headers)
        elif way == 'short':
            self.answer(200, content[:len(content) // 2], **headers)
        elif way == 'drop' or callable(way):
            self.answer(200, content[:len(content) // 2], Content_Length=str(len(content)), **headers)
            if callable(way):
                way()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif way in ('slow', 'stall'):
            self.answer(200, content[:len(content) // 2], Content_Length=str(len(content)), **headers)
            time.sleep(1 if way == 'slow' else 5)
            self.wfile.write(content[len(content) // 2:])
        else:
            self.answer(200, content, **headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that went away


@contextmanager
def serve(folder: Path) -> Iterator[Drive]:
    """Answer for Drive as long as the context lasts; `folder` is for its certificate."""
    certificate, key, drive = folder / 'drive.pem', folder / 'drive.key', Drive()
    subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', str(key), '-out', str(certificate),
         '-subj', '/CN=drive.google.com', '-addext', 'subjectAltName=' + ','.join(f'DNS:{host}' for host in HOSTS),
         '-addext', 'keyUsage=critical,digitalSignature,keyCertSign'], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with _Server(('127.0.0.1', 0), type('DriveHandler', (Handler,), {'drive': drive, 'tls': tls})) as server:
        drive.env = {'HTTPS_PROXY': f'http://127.0.0.1:{server.server_port}', 'REQUESTS_CA_BUNDLE': str(certificate),
                     'HOME': str(folder)}  # gdown keeps cookies there
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield drive
        finally:
            server.shutdown()
            thread.join()
