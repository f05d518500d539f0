//! Sockets on the loopback.
//!
//! Invariant: each run binds its own addresses, and no result names a port.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixDatagram, UnixListener, UnixStream, lookup_host};
use tokio::task::{JoinHandle, yield_now};

use crate::fixtures::{TEXT, text};
use crate::row::{From, Row, SELECT, Says, in_real_time};

const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// A connection to a peer that sends these bytes three at a time and keeps what it receives.
async fn connection(sends: &'static [u8]) -> (TcpStream, JoinHandle<String>) {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let address = listener.local_addr().unwrap();
    let peer = tokio::spawn(async move {
        let (mut there, _) = listener.accept().await.unwrap();
        there.set_nodelay(true).unwrap();
        for piece in sends.chunks(3) {
            there.write_all(piece).await.unwrap();
            yield_now().await;
        }
        let mut received = Vec::new();
        // A reset is an end too.
        there.read_to_end(&mut received).await.unwrap_or_default();
        text(&received)
    });
    (TcpStream::connect(address).await.unwrap(), peer)
}

/// How many connections wait at a listener ahead of one that is made now.
async fn waiting(listener: &TcpListener) -> usize {
    let last = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let mut before = 0;
    while listener.accept().await.unwrap().1 != last.local_addr().unwrap() {
        before += 1;
    }
    before
}

pub(crate) fn tcp() -> Vec<Row> {
    vec![
        Row::tokio("TcpListener::accept", "net/struct.TcpListener.html#method.accept", || {
            in_real_time(3).cancel_safe(
                async || {
                    let listener = TcpListener::bind(ANY).await.unwrap();
                    let address = listener.local_addr().unwrap();
                    drop(tokio::spawn(async move {
                        for number in 0..3 {
                            TcpStream::connect(address).await.unwrap().write_u8(number).await.unwrap();
                        }
                    }));
                    (listener, Vec::new())
                },
                async |(listener, accepted)| accepted.push(listener.accept().await.unwrap().0),
                async |(_, accepted)| {
                    let mut numbers = Vec::new();
                    for stream in accepted {
                        numbers.push(stream.read_u8().await.unwrap());
                    }
                    numbers
                },
            )
        })
        .says(Says::Safe),
        Row::tokio("TcpStream::connect", "net/struct.TcpStream.html#method.connect", || {
            in_real_time(1).cancel_safe(
                async || TcpListener::bind(ANY).await.unwrap(),
                async |listener| drop(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap()),
                async |listener| match waiting(listener).await {
                    1 => "the server saw one connection",
                    _ => "the server saw several connections",
                },
            )
        })
        .instead("spawn it and wait for its `JoinHandle` by reference, or accept a connection that is closed at once"),
        Row::tokio("TcpStream::read", "io/trait.AsyncReadExt.html#method.read", || {
            in_real_time(1).cancel_safe(
                async || (connection(TEXT).await, Vec::<u8>::new()),
                async |((stream, _), read)| {
                    while read.len() < TEXT.len() {
                        let mut buffer = [0; 5];
                        let bytes = stream.read(&mut buffer).await.unwrap();
                        read.extend(&buffer[..bytes]);
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::tokio("TcpStream::write", "io/trait.AsyncWriteExt.html#method.write", || {
            in_real_time(1).cancel_safe(
                async || (connection(b"").await, 0),
                async |((stream, _), written)| {
                    while *written < TEXT.len() {
                        let end = TEXT.len().min(*written + 5);
                        *written += stream.write(&TEXT[*written..end]).await.unwrap();
                    }
                },
                async |((stream, peer), _)| {
                    stream.shutdown().await.unwrap();
                    peer.await.unwrap()
                },
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::tokio("TcpStream::readable", "net/struct.TcpStream.html#method.readable", || {
            in_real_time(1).cancel_safe(
                async || (connection(TEXT).await, Vec::<u8>::new()),
                async |((stream, _), read)| {
                    while read.len() < TEXT.len() {
                        stream.readable().await.unwrap();
                        let mut buffer = [0; 5];
                        // There may be nothing to read after all.
                        let bytes = stream.try_read(&mut buffer).unwrap_or(0);
                        read.extend(&buffer[..bytes]);
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .how("then `try_read`")
        .says(Says::Safe),
        Row::tokio("TcpStream::peek", "net/struct.TcpStream.html#method.peek", || {
            in_real_time(1).cancel_safe(
                async || connection(TEXT).await,
                async |(stream, _)| {
                    let mut buffer = [0; 1];
                    stream.peek(&mut buffer).await.unwrap();
                    text(&buffer)
                },
                async |(stream, _)| char::from(stream.read_u8().await.unwrap()),
            )
        })
        .says(Says::Safe),
        Row::tokio("net::lookup_host", "net/fn.lookup_host.html", || {
            in_real_time(1).cancel_safe(
                async || (),
                async |()| lookup_host("localhost:80").await.unwrap().map(|it| it.is_ipv4()).collect::<BTreeSet<_>>(),
                async |()| (),
            )
        })
        .instead("spawn it, and wait for its `JoinHandle` by reference"),
    ]
}

pub(crate) fn others() -> Vec<Row> {
    vec![
        Row::tokio("UdpSocket::recv_from", "net/struct.UdpSocket.html#method.recv_from", || {
            in_real_time(3).cancel_safe(
                async || {
                    let (here, there) = (UdpSocket::bind(ANY).await.unwrap(), UdpSocket::bind(ANY).await.unwrap());
                    let address = here.local_addr().unwrap();
                    drop(tokio::spawn(async move {
                        for number in 0..3 {
                            there.send_to(&[number], address).await.unwrap();
                            yield_now().await;
                        }
                    }));
                    here
                },
                async |socket| {
                    let mut buffer = [0; 8];
                    socket.recv_from(&mut buffer).await.unwrap();
                    buffer[0]
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("UdpSocket::send_to", "net/struct.UdpSocket.html#method.send_to", || {
            in_real_time(3).cancel_safe(
                async || (UdpSocket::bind(ANY).await.unwrap(), UdpSocket::bind(ANY).await.unwrap(), 0),
                async |(here, there, number)| {
                    here.send_to(&[*number], there.local_addr().unwrap()).await.unwrap();
                    *number += 1;
                },
                async |(here, there, _)| {
                    here.send_to(b"\xff", there.local_addr().unwrap()).await.unwrap();
                    let (mut received, mut buffer) = (Vec::new(), [0; 8]);
                    while buffer[0] != 0xff {
                        there.recv_from(&mut buffer).await.unwrap();
                        received.push(buffer[0]);
                    }
                    received
                },
            )
        })
        .says(Says::Safe),
        Row::tokio("UnixListener::accept", "net/struct.UnixListener.html#method.accept", || {
            in_real_time(3).cancel_safe(
                async || {
                    let directory = TempDir::new().unwrap();
                    let path = directory.path().join("socket");
                    let listener = UnixListener::bind(&path).unwrap();
                    drop(tokio::spawn(async move {
                        for number in 0..3 {
                            UnixStream::connect(&path).await.unwrap().write_u8(number).await.unwrap();
                        }
                    }));
                    (listener, Vec::new(), directory)
                },
                async |(listener, accepted, _)| accepted.push(listener.accept().await.unwrap().0),
                async |(_, accepted, _)| {
                    let mut numbers = Vec::new();
                    for stream in accepted {
                        numbers.push(stream.read_u8().await.unwrap());
                    }
                    numbers
                },
            )
        })
        .says(Says::Safe),
        Row::tokio("UnixDatagram::recv", "net/struct.UnixDatagram.html#method.recv", || {
            in_real_time(3).cancel_safe(
                async || {
                    let (here, there) = UnixDatagram::pair().unwrap();
                    drop(tokio::spawn(async move {
                        for number in 0..3 {
                            there.send(&[number]).await.unwrap();
                            yield_now().await;
                        }
                        std::future::pending::<()>().await;
                    }));
                    here
                },
                async |socket| {
                    let mut buffer = [0; 8];
                    socket.recv(&mut buffer).await.unwrap();
                    buffer[0]
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
    ]
}
